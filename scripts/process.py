"""What `pretrain.py` checks and sets for its whole process, which a library must leave to its caller."""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
import threading
from pathlib import Path

# Bytes of address space that the smallest run adds to an interpreter with jax, on two cores; libraries have two pools
# with a thread for each other core, with a stack of 8 MiB.
_RUN, _STACK, _CORES = 2_000_000_000, 1 << 23, 2


def prepare_script() -> None:
    """Both of what follows; raises what `check_addresses` does."""
    check_addresses()
    hide_traces()


def check_addresses() -> None:
    """Refuses a limit of the address space (`ulimit -v`) under which no run can start.

    Threads of array_record 0.8.6 wait for ever for one of them that cannot start.

    Raises:
        ValueError: with the limit.
    """
    if (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) == resource.RLIM_INFINITY:
        return
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    needed = used + _RUN + 2 * _STACK * max((os.cpu_count() or 1) - _CORES, 0)
    if limit < needed:
        raise ValueError(
            f"the address space of this process is limited to {limit / 1e9:.1f} GB, and a run needs at least "
            f"{needed / 1e9:.1f} GB; raise the limit (ulimit -v unlimited)"
        )


def hide_traces() -> None:
    """Hides the traces, 80 lines and more, that orbax 0.12.8 leaves of a failed save: the run's log has it in a line.

    orbax logs the error in each of its threads, asyncio the tasks that nobody awaits, tensorstore their closed loop.
    A Ctrl-C that Python would report as a trace and ignore, since it came within a destructor, is raised again.
    """
    hook = sys.unraisablehook

    def others(unraisable: sys.UnraisableHookArgs) -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            again = (threading.main_thread().ident, signal.SIGINT)
            threading.Timer(0.05, signal.pthread_kill, again).start()  # in which time the destructor has been left
        elif str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = others
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(lambda record: not record.exc_info)
