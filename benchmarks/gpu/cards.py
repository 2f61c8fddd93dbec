"""Describes Hopper GPUs to XLA's compiler on a machine without one, and makes a process lower programs for them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

from jax.experimental import topologies


class Card(NamedTuple):
    """What differs between two Hopper cards.

    Attributes:
        name: as the driver gives it.
        memory: its bytes.
        bandwidth: bytes per second of its memory.
    """

    name: str
    memory: int
    bandwidth: float

    @property
    def usable(self) -> float:
        """Bytes that a run may use, by `prepare_process`."""
        return 0.92 * self.memory


CARDS = {
    "H200": Card("NVIDIA H200 141GB HBM3e", 151_397_597_184, 4.8e12),
    "H100": Card("NVIDIA H100 80GB HBM3", 81_559 * 2**20, 3.35e12),
}
# A card as XLA's `GpuTargetConfigProto` describes it. The numbers are those of openxla/xla's own description, except
# the memory: without a device, XLA plans for 80% of the given size.
TARGET = """
gpu_device_info {
  name: "NAME" device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0a"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  memory_bandwidth: BANDWIDTH device_memory_size: MEMORY l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_address_bits: 64 pcie_bandwidth: 34359738368 ecc_enabled: true
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.2"
}
platform_name: "CUDA" device_description_str: "NAME"
dnn_version_info { major: 9 minor: 10 patch: 2 } runtime_version { major: 13 }
"""
# Replacements under which a process selects and lowers the programs of a Hopper GPU with cuDNN.
_CUDNN = "jax._src.cudnn.fused_attention_stablehlo."
PRETENCE = {
    _CUDNN + "check_cudnn_version": lambda: 91002,
    _CUDNN + "check_compute_capability": lambda capability: True,
    "jax.default_backend": lambda: "gpu",
}


@contextlib.contextmanager
def pretend_gpu() -> Iterator[None]:
    """Inside, this process lowers for a Hopper GPU."""
    with contextlib.ExitStack() as stack:
        for name, value in PRETENCE.items():
            stack.enter_context(mock.patch(name, value))
        yield


@functools.cache
def devices_of(card: str, count: int) -> list[Any]:
    """`count` devices of a card that this machine does not have, 8 per node.

    Raises:
        SystemExit: when jax's CUDA compiler is not installed, with the command that does it.
    """
    name, _, bandwidth = CARDS[card]
    nodes = max(count // 8, 1)
    values = {"NAME": name, "BANDWIDTH": f"{bandwidth:.0f}", "MEMORY": f"{CARDS[card].usable / 0.8:.0f}"}
    target = functools.reduce(lambda text, key: text.replace(key, values[key]), values, TARGET)
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=target, topology=f"1x{nodes}x{count // nodes}"
        )
    except (NotImplementedError, RuntimeError) as error:
        raise SystemExit(
            f"jax's CUDA compiler is not installed ({error}); install it with: bash benchmarks/gpu/compiler.sh"
        ) from error
    return topology.devices
