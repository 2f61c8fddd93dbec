"""A script that ends without a traceback on Ctrl-C, which may come before it handles signals."""

from __future__ import annotations

import functools
from collections.abc import Callable


def interruptible(main: Callable[[], int]) -> Callable[[], int]:
    """`main`, with status 130 for Ctrl-C, as a shell reports it."""

    @functools.wraps(main)
    def run() -> int:
        try:
            return main()
        except KeyboardInterrupt:
            return 130

    return run
