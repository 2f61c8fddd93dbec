"""What a script sets before jax opens a GPU; importing jaxllm changes nothing.

An XLA flag that a release lacks aborts the process, so flags are tried in another process first.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from jaxllm.host import processes
from jaxllm.host.device import nvidia_devices

# What JAX's guide to GPU performance recommends for one device; benchmarks/gpu/variants.py has others to compare with.
TRAIN_FLAGS = ("--xla_gpu_triton_gemm_any=true",)


def prepare_process(flags: Sequence[str] = TRAIN_FLAGS) -> None:
    """Lets jax take most of a GPU's memory and sets the flags that its XLA accepts; a no-op without an NVIDIA GPU.

    Settings that are already in the environment stay. Call it before jax opens its devices.
    """
    first = processes.index() == 0
    accepted = processes.gather(" ".join(accepted_flags(flags)) if first and nvidia_devices() else "")[:1]
    if not nvidia_devices():
        return
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    os.environ["XLA_FLAGS"] = " ".join([*accepted, os.environ.get("XLA_FLAGS", "")]).strip()


def accepted_flags(flags: Sequence[str]) -> tuple[str, ...]:
    """Those of `flags` with which a process survives a compilation."""
    if not flags or _survives(flags):
        return tuple(flags)
    return tuple(flag for flag in flags if _survives([flag]))


def _survives(flags: Sequence[str]) -> bool:
    environment = {**os.environ, "XLA_FLAGS": " ".join(flags), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-c", "import jax; jax.jit(lambda x: x + 1)(1.0)"]
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0
