"""Handles standard output that cannot be written: a pipe without a reader, or a file on a full disk."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Iterator


def reader_left() -> bool:
    """Whether standard output is a pipe without a reader; a BrokenPipeError may come from another process's pipe."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    return bool(output.poll(0))


def discard_output() -> None:
    """Sends what is still buffered to the null device, since Python flushes standard output once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def log_may_be_lost() -> Iterator[None]:
    """Inside, log lines that cannot be written because the disk is full do not change the exit status."""
    try:
        yield
    finally:
        try:
            print(end="", flush=True)
        except BrokenPipeError:
            raise
        except OSError:
            discard_output()
