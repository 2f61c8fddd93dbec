"""What benchmarks against a reference share: shapes, each side in a process of its own, how a result was made.

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxllm.config import LlamaConfig, T5Config

RESULTS = Path(__file__).parent / "results"
_TUNABLES = "GLIBC_TUNABLES"
_PACKAGES = ("jax", "flax", "optax", "torch", "transformers")

_A: dict[str, Any] = {"vocab_size": 8192, "d_model": 256, "d_ff": 688, "num_layers": 4, "num_heads": 8}
_TOY: dict[str, Any] = {"vocab_size": 512, "d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 4}
SHAPES: dict[str, LlamaConfig | T5Config] = {
    "A": LlamaConfig(**_A, num_kv_heads=4),
    "B": LlamaConfig(vocab_size=32000, d_model=512, d_ff=1376, num_layers=8, num_heads=8, num_kv_heads=4),
    "TA": T5Config(**_A, head_dim=32),
    "toy": LlamaConfig(**_TOY, num_kv_heads=2),
    "toy_t5": T5Config(**_TOY, head_dim=16),
}


def run_side(side: str, work: str | Path) -> dict[str, Any]:
    """This process's own command line once more with --side and --work added; the JSON object on its last line."""
    command = [sys.executable, *sys.argv, "--side", side, "--work", str(work)]
    environment = {_TUNABLES: "glibc.malloc.hugetlb=1", **os.environ}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def spread(values: list[float]) -> dict[str, float]:
    """Smallest, median and largest."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


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
