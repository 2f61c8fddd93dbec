"""The accelerator of a run: its datasheet figures, its memory, and jax's cache of compiled programs."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

# NVIDIA's datasheets: FLOP/s of dense 16-bit matmuls (bfloat16; float16 on V100 and T4, which have no bfloat16 units),
# and memory bytes/s. A row matches a device_kind that has all of the row's words; the row of most words counts.
_PEAKS = {
    "B200": (2250e12, 8.0e12),
    "GH200 480GB": (989e12, 4.0e12),
    "H200": (989e12, 4.8e12),
    "H200 NVL": (835e12, 4.8e12),
    "H100": (989e12, 3.35e12),
    "H100 NVL": (835e12, 3.9e12),
    "H100 PCIe": (756e12, 2.0e12),
    "A100": (312e12, 1.555e12),
    "A100 80GB": (312e12, 2.039e12),
    "A100 80GB PCIe": (312e12, 1.935e12),
    "A10": (125e12, 0.6e12),
    "A10G": (70e12, 0.6e12),
    "L40S": (362e12, 0.864e12),
    "L40": (181e12, 0.864e12),
    "L4": (121e12, 0.3e12),
    "V100": (125e12, 0.9e12),
    "V100 PCIE": (112e12, 0.9e12),
    "V100S": (130e12, 1.134e12),
    "T4": (65e12, 0.32e12),
}

_GROUPS = Path("/sys/fs/cgroup")
_CACHE_SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


class Device(NamedTuple):
    """One accelerator."""

    kind: str  # jax's name of it
    count: int  # number of such devices
    memory: int | None  # bytes that this process may use on each; None where jax gives none (CPU)
    flops: float | None  # peak FLOP/s of dense 16-bit matmuls by datasheet, None where the device is not known
    bandwidth: float | None  # peak memory bytes/s by datasheet, None likewise


def detect_device() -> Device:
    """The devices of all processes."""
    devices = jax.devices()
    kind = devices[0].device_kind
    flops, bandwidth = datasheet_peaks(kind) or (None, None)
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return Device(kind, len(devices), memory, flops, bandwidth)


def host_memory() -> int:
    """Bytes of memory and swap for this process: those of the machine, or of its control group if that has fewer."""
    memory, swap, groups = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "0", [Path()]
    with contextlib.suppress(OSError):
        swap = Path("/proc/meminfo").read_text().partition("SwapTotal:")[2].split()[0]
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
        groups += [Path(name.lstrip("/")) for _, kinds, name in lines if kinds in ("", "memory")]
    for group in {folder for each in groups for folder in (each, *each.parents)}:
        for file in (_GROUPS / group / "memory.max", _GROUPS / "memory" / group / "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # "max"
                memory = min(memory, int(file.read_text()))
    return memory + int(swap) * 1024


def datasheet_peaks(kind: str) -> tuple[float, float] | None:
    """FLOP/s and memory bytes/s of a device_kind such as "NVIDIA H100 PCIe"; None for one not known, or a MIG slice."""
    words = set(re.split(r"[ -]", kind))
    known = [name for name in _PEAKS if words.issuperset(name.split())]
    if not known or "MIG" in words:
        return None
    return _PEAKS[max(known, key=lambda name: len(name.split()))]


def nvidia_devices(folder: Path = Path("/dev")) -> list[Path]:
    """The NVIDIA GPUs that this process may open, found without opening one; a container may have nvidia3 alone."""
    return sorted(folder.glob("nvidia[0-9]*"))


@contextlib.contextmanager
def compilation_cache(path: str | Path | None) -> Iterator[None]:
    """The persistent cache of jax in a folder, for one run; afterwards jax has the settings that it had before."""
    if path is None:
        yield
        return
    before = [getattr(jax.config, name) for name in _CACHE_SETTINGS]
    _set_cache(str(Path(path).expanduser().absolute()), 0.0)
    try:
        yield
    finally:
        _set_cache(*before)


def _set_cache(folder: str | None, seconds: float) -> None:
    for name, value in zip(_CACHE_SETTINGS, (folder, seconds), strict=True):
        jax.config.update(name, value)
    reset_cache()  # jax keeps to the first folder that it has opened
