"""Every question about the platform that a program is made for; the answers are read while it is traced."""

from __future__ import annotations

import jax


def on_gpu() -> bool:
    """Whether programs are made for a GPU."""
    return jax.default_backend() == "gpu"


def on_cpu() -> bool:
    """Whether programs are made for a CPU."""
    return jax.default_backend() == "cpu"
