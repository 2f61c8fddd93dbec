"""Scripts end without a traceback on Ctrl-C, also before they handle signals, and when their output pipe is closed."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

from output import discard_output, reader_left


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
            if not reader_left():
                raise
            discard_output()
            return 141
        except SystemExit as end:
            if isinstance(end.__context__, BrokenPipeError):  # rich 15 raises SystemExit(1) for it
                return 141
            raise

    return run


def failed(error: Exception, status: int = 2) -> int:
    """Prints an error and returns the exit status.

    If standard output has no reader, raises the error again, for `interruptible`.
    """
    if isinstance(error, BrokenPipeError) and reader_left():
        raise error
    print(f"error: {error}", file=sys.stderr)
    return status
