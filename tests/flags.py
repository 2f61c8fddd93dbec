"""Flags of XLA that the installed release knows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence


def accepted_flags(flags: Sequence[str]) -> tuple[str, ...]:
    """Those of `flags` with which a process survives a compilation: XLA aborts at a flag that its release lacks."""
    if not flags or _survives(flags):
        return tuple(flags)
    return tuple(flag for flag in flags if _survives([flag]))


def _survives(flags: Sequence[str]) -> bool:
    environment = {**os.environ, "XLA_FLAGS": " ".join(flags), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-c", "import jax; jax.jit(lambda x: x + 1)(1.0)"]
    try:
        return subprocess.run(command, env=environment, capture_output=True, check=False, timeout=60).returncode == 0
    except subprocess.TimeoutExpired:
        return False
