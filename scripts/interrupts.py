"""Scripts end without a traceback on Ctrl-C, also before they handle signals, and when their output pipe is closed."""

from __future__ import annotations

import contextlib
import functools
import os
import select
import sys
from collections.abc import Callable, Iterator


def interruptible(main: Callable[[], int]) -> Callable[[], int]:
    """`main` with a shell's statuses: 130 for Ctrl-C, and 141 when the reader of its output, such as `head`, ended."""

    @functools.wraps(main)
    def run() -> int:
        try:
            try:
                return main()
            finally:
                print(end="", flush=True)  # argparse raises SystemExit while its help is still in the buffer
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:
            if not _reader_left():
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at exit
            return 141
        except SystemExit as end:
            if isinstance(end.__context__, BrokenPipeError):  # rich 15 raises SystemExit(1) for it
                return 141
            raise

    return run


def failed(error: Exception, status: int = 2) -> int:
    """Reports an error and returns the exit status; raises it again, for `interruptible`, if the output is closed."""
    if isinstance(error, BrokenPipeError) and _reader_left():
        raise error
    print(f"error: {error}", file=sys.stderr)
    return status


@contextlib.contextmanager
def log_may_be_lost() -> Iterator[None]:
    """Lines of a log that a full disk refuses do not change the exit status of the block."""
    try:
        yield
    finally:
        try:
            print(end="", flush=True)
        except BrokenPipeError:
            raise
        except OSError:
            _discard()


def _discard() -> None:
    """Sends what standard output still holds nowhere, for Python's own flush at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _reader_left() -> bool:
    """Whether standard output is a pipe without a reader; an error may come from the pipe of another process."""
    waiting = select.poll()
    waiting.register(sys.stdout.fileno(), 0)
    return bool(waiting.poll(0))
