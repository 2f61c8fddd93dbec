"""A script that ends without a traceback on Ctrl-C, which may come before it handles signals, and in a closed pipe."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable


def interruptible(main: Callable[[], int]) -> Callable[[], int]:
    """`main`, with status 130 for Ctrl-C, and 141 where a reader such as `head` has left, as a shell reports them."""

    @functools.wraps(main)
    def run() -> int:
        try:
            status = main()
            sys.stdout.flush()
            return status
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at its end
            return 141

    return run
