"""What nvidia-smi shows of a GPU; nothing is set."""

from __future__ import annotations

import subprocess

CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")


def gpu_clocks() -> dict[str, str]:
    """What nvidia-smi shows of the clocks; nothing where there is none."""
    return smi(*CLOCKS)


def smi(*names: str) -> dict[str, str]:
    """Values of the first GPU by nvidia-smi's names of them; nothing where there is no nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(names, done.stdout.splitlines()[0].split(", "), strict=False))
