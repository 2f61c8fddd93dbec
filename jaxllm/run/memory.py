"""How much memory the system gives to this process."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

# Bytes of address space that the smallest run adds to an interpreter with jax, and that reading its data adds to a run:
# array_record 0.8.6 has 64 threads, and waits for ever when one cannot start.
RUN_ADDRESSES, DATA_ADDRESSES = 2_000_000_000, 700_000_000
_GROUPS = Path("/sys/fs/cgroup")


def check_addresses(needed: int) -> None:
    """Refuses a limit of the address space (`ulimit -v`) that leaves fewer bytes; ValueError with the limit."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    if limit - used < needed:
        raise ValueError(
            f"the address space of this process is limited to {limit / 1e9:.1f} GB, and a run needs at least "
            f"{(used + needed) / 1e9:.1f} GB; raise the limit (ulimit -v unlimited)"
        )


def host_memory() -> int:
    """Bytes of memory and swap for this process: those of the machine, or of its control group if that has fewer."""
    memory, swap, groups = os.sysconf("SC_PHYS_PAGES") * resource.getpagesize(), 0, [Path()]
    with contextlib.suppress(OSError):
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
        groups += [Path(name.lstrip("/")) for _, kinds, name in lines if kinds in ("", "memory")]
    for group in {folder for each in groups for folder in (each, *each.parents)}:
        for file in (_GROUPS / group / "memory.max", _GROUPS / "memory" / group / "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # "max"
                memory = min(memory, int(file.read_text()))
    with contextlib.suppress(OSError):
        swap = Path("/proc/meminfo").read_text().partition("SwapTotal:")[2].split()[0]
    return memory + int(swap) * 1024
