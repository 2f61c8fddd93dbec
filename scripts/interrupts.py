"""A script that ends without a traceback on Ctrl-C, which may come before it handles signals, and in a closed pipe."""

from __future__ import annotations

import functools
import os
import select
import sys
from collections.abc import Callable


def interruptible(main: Callable[[], int]) -> Callable[[], int]:
    """`main`, with status 130 for Ctrl-C, and 141 where a reader such as `head` has left, as a shell reports them."""

    @functools.wraps(main)
    def run() -> int:
        try:
            try:
                return main()
            finally:
                print(end="", flush=True)  # argparse leaves by SystemExit, with its help in the buffer
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:
            if not _reader_left():
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at its end
            return 141
        except SystemExit as end:
            if isinstance(end.__context__, BrokenPipeError):  # rich 15 handles it so, with status 1
                return 141
            raise

    return run


def failed(error: Exception, status: int = 2) -> int:
    """Reports an error and returns the exit status; raises it again, for `interruptible`, where the reader has left."""
    if isinstance(error, BrokenPipeError) and _reader_left():
        raise error
    print(f"error: {error}", file=sys.stderr)
    return status


def _reader_left() -> bool:
    """Whether standard output is a pipe that nobody reads: the one that broke may be of another process."""
    waiting = select.poll()
    waiting.register(sys.stdout.fileno(), 0)
    return bool(waiting.poll(0))
