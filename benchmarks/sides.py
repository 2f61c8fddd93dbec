"""What benchmarks beside a reference share: each side in a process of its own, and what a result says of its making.

All sides start with glibc told to ask for huge pages, as `scripts/pretrain.py` does for itself, unless GLIBC_TUNABLES
says otherwise.
"""

from __future__ import annotations

import importlib.metadata as metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_TUNABLES = "GLIBC_TUNABLES"
_PACKAGES = ("jax", "flax", "optax", "torch", "transformers")


def run_side(side: str, work: str | Path) -> dict[str, Any]:
    """This process's own command line once more with --side and --work added; the JSON object on its last line."""
    command = [sys.executable, *sys.argv, "--side", side, "--work", str(work)]
    environment = {_TUNABLES: "glibc.malloc.hugetlb=1", **os.environ}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def spread(values: list[float]) -> dict[str, float]:
    """Smallest, median and largest."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def environment() -> dict[str, Any]:
    """Device, processor, versions, commit and date of a result."""
    import jax

    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent, check=False).stdout.strip()
    installed = {dist.metadata["Name"] for dist in metadata.distributions()}
    return {
        "device": jax.devices()[0].device_kind,
        "processor": processor(),
        "versions": {name: metadata.version(name) for name in _PACKAGES if name in installed},
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def processor() -> str:
    """The CPU by name, cores, and the widest vectors and matrices that it has: what ratios on a CPU depend on most."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    lines = (line.partition(":") for line in cpuinfo.read_text(encoding="utf-8").splitlines())
    fields = {name.strip(): value.strip() for name, _, value in lines}
    features = [name for name in ("avx2", "avx512f", "amx_bf16") if name in fields.get("flags", "").split()]
    return ", ".join([fields.get("model name", platform.machine()), f"{os.cpu_count()} cores", *features])


def save(kind: str, result: dict[str, Any]) -> Path:
    """Writes results/KIND_DEVICE.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{kind}_{result['device'].replace(' ', '_')}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path
