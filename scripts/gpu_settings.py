"""What a script sets before jax opens a GPU; importing jaxllm changes nothing."""

from __future__ import annotations

import os

from jaxllm.host.device import nvidia_devices


def prepare_process() -> None:
    """Lets jax take most of a GPU's memory; a no-op without an NVIDIA GPU.

    Settings that are already in the environment stay. Call it before jax opens its devices.
    """
    if nvidia_devices():
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
