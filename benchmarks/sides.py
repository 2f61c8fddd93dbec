"""Shared by benchmarks that run another library as well: each side in its own process, and how a result was made.

All sides start with the variable that makes glibc request huge pages, as `scripts/pretrain.py` does for itself, unless
GLIBC_TUNABLES is set already.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.record import RESULTS, ROOT, commit, versions
from benchmarks.report import spread

_TUNABLES = "GLIBC_TUNABLES"


def run_side(side: str, work: str | Path) -> dict[str, Any]:
    """This process's own command line once more with --side and --work added; the JSON object on its last line."""
    command = [sys.executable, "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]
    command += ["--side", side, "--work", str(work)]
    environment = {_TUNABLES: "glibc.malloc.hugetlb=1", **os.environ}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def ratios(turns: list[dict[str, Any]], others: Sequence[str]) -> dict[str, dict[str, float]]:
    """Our speed over that of each other side, within each turn: smallest, median and largest."""
    speed = "tokens_per_second"
    return {side: spread([turn["jaxllm"][speed] / turn[side][speed] for turn in turns]) for side in others}


def shown(ratios: dict[str, dict[str, float]]) -> str:
    """Ratios as a row of README's table has them."""
    return ", ".join("{median:.2f}x ({min:.2f} to {max:.2f}) ".format(**x) + side for side, x in ratios.items())


def environment() -> dict[str, Any]:
    """Device, processor, versions, commit and date of a result."""
    import jax

    return {
        "device": jax.devices()[0].device_kind,
        "processor": processor(),
        "versions": versions(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def processor() -> str:
    """The CPU by name, cores, and its widest vectors and matrices, on which ratios depend most."""
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
