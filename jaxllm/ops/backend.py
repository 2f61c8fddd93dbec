"""Every branch on the platform that a program is made for, and which kernels of this library's own it uses.

The answers are read while a program is traced. `JAXLLM_KERNELS` names the kernels to use, separated by commas; without
it there are none. Set it before the process starts: programs that have been traced already are not traced again.
"""

from __future__ import annotations

import os

import jax

# What `JAXLLM_KERNELS` may name. Each has a form in plain jax that gives the same values, and is used elsewhere.
KERNELS: tuple[str, ...] = ()


def on_gpu() -> bool:
    """Whether programs are made for a GPU."""
    return jax.default_backend() == "gpu"


def on_cpu() -> bool:
    """Whether programs are made for a CPU."""
    return jax.default_backend() == "cpu"


def uses_kernel(name: str) -> bool:
    """Whether `JAXLLM_KERNELS` names this kernel.

    Raises:
        ValueError: for a name in the variable that is not one of `KERNELS`.
    """
    named = [word.strip() for word in os.environ.get("JAXLLM_KERNELS", "").split(",") if word.strip()]
    if unknown := sorted(set(named) - set(KERNELS)):
        raise ValueError(f"JAXLLM_KERNELS: no kernel {', '.join(unknown)}; there are {', '.join(KERNELS) or 'none'}")
    return name in named
