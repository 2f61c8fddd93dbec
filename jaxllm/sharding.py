"""How a run is laid out over devices: rows of a batch over all of them, parameters and moments over one axis.

One table of rules by the name of a leaf, so that models know nothing of devices. The optimizer's trees end in the
parameters' paths and follow the same rules. XLA inserts the communication; a sharded step computes what a single
device would. Not here: several processes, tensor or pipeline parallelism.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Axis, counted from the end, over which a leaf is split; other leaves (norms, biases, scalars) are copied.
RULES = {"embed": 2, "lm_head": 2, "kernel": 2}


def make_mesh(devices: Sequence[Any] | None = None, *, fsdp: int | None = None) -> Mesh:
    """Devices as (data, fsdp); parameters are split `fsdp` ways (all by default) and copied over data.

    Raises:
        ValueError: when the number of devices is not a multiple of `fsdp`.
    """
    devices = list(jax.devices() if devices is None else devices)
    fsdp = len(devices) if fsdp is None else fsdp
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(f"{len(devices)} devices can't be split into groups of {fsdp}; choose a divisor")
    return Mesh(np.array(devices).reshape(-1, fsdp), ("data", "fsdp"))


def state_shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a parameter tree or train state, abstract or not."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: NamedSharding(mesh, _spec(path, leaf, mesh)), tree)


def _spec(path: tuple[Any, ...], leaf: Any, mesh: Mesh) -> PartitionSpec:
    axis = RULES.get(getattr(path[-1], "key", "")) if path else None
    # Factored moments bear the names of matrices without having their shapes, and not every size divides.
    if axis is None or leaf.ndim < axis or leaf.shape[-axis] % mesh.shape["fsdp"]:
        return PartitionSpec()
    return PartitionSpec(*[None] * (leaf.ndim - axis), "fsdp")


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
