"""How a run is laid out over the devices of one process: rows of a batch, parameters and moments over one axis.

The name of a leaf decides which of its axes is split (`jaxllm.training.names`), also in the optimizer's trees, whose
paths end in the parameters' paths. Every device computes its rows as on a single device, with whole parameters that are
gathered in the compute dtype once per step. Gradients are summed in float32, and every device keeps its share of the
sums. The collectives are written out, because XLA's partitioner would move activations in the scans over chunks of the
loss and over microbatches. The loss scale gets the sums, so all devices skip the same steps. Devices may belong to
several processes, which run the same program (`jaxllm.run.processes`). Out of scope: tensor or pipeline parallelism.

The loop of `jaxllm.training.program`, on all devices:

    mesh = make_mesh()
    program = program_of(config, mesh)
    layout = state_shardings(program.abstract_state(), mesh)
    state = jax.jit(program.fresh_state, out_shardings=layout)()  # no device ever holds it all
    step = jax.jit(program.train_step, donate_argnums=0, out_shardings=(layout, None))
    for batch in batches:
        state, metrics = step(state, place_rows(batch, mesh))
    params = jax.device_put(state.params, jax.devices()[0])  # decoding uses one device

`Checkpoints.restore(with_shardings(program.abstract_state(), mesh))` restores a state onto another number of devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxllm.training.names import role_of

_AXIS = "devices"
_COPIED, _ROWS = PartitionSpec(), PartitionSpec(_AXIS)


def make_mesh(devices: Sequence[Any] | None = None) -> Mesh | None:
    """All devices (or those given) as one axis; None for a single one, which needs no layout."""
    devices = list(jax.devices() if devices is None else devices)
    return Mesh(np.array(devices), (_AXIS,)) if len(devices) > 1 else None


def check_rows(*, batch_size: int, accumulation: int, devices: int) -> None:
    """Raises ValueError for microbatches whose rows can't be shared equally, with the next batch size that fits."""
    step = devices * accumulation
    if batch_size % step:
        fitting = -(-batch_size // step) * step
        raise ValueError(
            f"training.batch_size {batch_size} in {accumulation} microbatches (training.accumulation) can't be shared "
            f"equally by {devices} devices; use a multiple of {step}, e.g. training.batch_size={fitting}, or fewer "
            "devices (CUDA_VISIBLE_DEVICES=0 is one)"
        )


def state_shardings(tree: Any, mesh: Mesh | None) -> Any:
    """The sharding of every leaf of a parameter tree or train state, abstract or not."""
    if mesh is None:
        return jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), tree)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), state_specs(tree, mesh.size))


def state_specs(tree: Any, devices: int) -> Any:
    """Which axis of every leaf is split over so many devices."""

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        axis = role_of(path).split
        # Factored moments have the names of matrices without their shapes, and not every size can be divided.
        if devices == 1 or axis is None or leaf.ndim < axis or leaf.shape[-axis] % devices:
            return _COPIED
        return PartitionSpec(*[None] * (leaf.ndim - axis), _AXIS)

    return jax.tree_util.tree_map_with_path(spec, tree)


def with_shardings(tree: Any, mesh: Mesh | None) -> Any:
    """An abstract tree with the sharding of each leaf, for restoring a checkpoint."""
    shardings = state_shardings(tree, mesh)
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, shardings)


def device_bytes(tree: Any, devices: int) -> int:
    """Bytes of all leaves on each of so many devices."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(state_specs(tree, devices)), strict=True)
    return sum(leaf.size * leaf.dtype.itemsize // (devices if _AXIS in spec else 1) for leaf, spec in leaves)


def row_sharding(mesh: Mesh) -> NamedSharding:
    """The layout of a batch over the devices of a mesh, by rows."""
    return NamedSharding(mesh, _ROWS)


def place_rows(batch: Mapping[str, Any], mesh: Mesh | None) -> dict[str, jax.Array]:
    """A batch on its devices, rows in order; the copy continues after this returns.

    Each of several processes has the same batch, and copies the rows of its own devices.
    """
    at = None if mesh is None else row_sharding(mesh)
    if at is None or at.is_fully_addressable:
        return jax.device_put(dict(batch), at)
    return {name: jax.make_array_from_callback(rows.shape, at, rows.__getitem__) for name, rows in batch.items()}


def fetch(tree: Any) -> Any:
    """The values of a tree on the host, whole, on whatever devices they are; of several processes, all must call it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def sum_gradients(gradients: Callable[..., tuple[Any, Any]], mesh: Mesh | None) -> Callable[..., tuple[Any, Any]]:
    """The gradient function of a batch that is spread over several devices; unchanged for a single one.

    `gradients` is (params, batch, key, *, factor, reduce) -> (sums, gradients), where `reduce` maps the sums and
    float32 gradients of each microbatch to those of all devices. The result, (params, batch, key, *, factor) -> (sums,
    gradients), computes the same as on one device and lays gradients out as parameters. Dropout differs: each device
    draws from a separate key.
    """
    if mesh is None:
        return gradients

    def spread(params: Any, batch: Any, key: jax.Array, *, factor: jax.Array) -> tuple[Any, Any]:
        specs = state_specs(params, mesh.size)

        def reduce(value: tuple[Any, Any]) -> tuple[Any, Any]:
            sums, grads = value
            return jax.lax.psum(sums, _AXIS), jax.tree.map(_share_of_sum, grads, specs)

        def on_device(params: Any, rows: Any, key: jax.Array, factor: jax.Array) -> tuple[Any, Any]:
            key = jax.random.fold_in(key, jax.lax.axis_index(_AXIS))
            return gradients(_whole(params, specs), rows, key, factor=factor, reduce=reduce)

        inputs = (specs, _ROWS, _COPIED, _COPIED)
        # Derivatives are taken inside only, so check_vma (which values differ between devices) is not needed.
        shared = jax.shard_map(on_device, mesh=mesh, in_specs=inputs, out_specs=(_COPIED, specs), check_vma=False)
        return shared(params, batch, key, factor)

    return spread


def map_rows(function: Callable[[Any, Any], Any], mesh: Mesh | None, *, summed: bool) -> Callable[[Any, Any], Any]:
    """function(params, batch) of a batch spread over several devices: results added up, or rows put in order."""
    if mesh is None:
        return function

    def spread(params: Any, batch: Any) -> Any:
        specs = state_specs(params, mesh.size)

        def on_device(params: Any, rows: Any) -> Any:
            value = function(_whole(params, specs), rows)
            return jax.lax.psum(value, _AXIS) if summed else value

        inputs, output = (specs, _ROWS), _COPIED if summed else _ROWS
        shared = jax.shard_map(on_device, mesh=mesh, in_specs=inputs, out_specs=output, check_vma=False)
        return shared(params, batch)

    return spread


def _whole(params: Any, specs: Any) -> Any:
    def gather(share: jax.Array, spec: PartitionSpec) -> jax.Array:
        if _AXIS not in spec:
            return share
        return jax.lax.all_gather(share, _AXIS, axis=spec.index(_AXIS), tiled=True)

    return jax.tree.map(gather, params, specs)


def _share_of_sum(grad: jax.Array, spec: PartitionSpec) -> jax.Array:
    if _AXIS not in spec:
        return jax.lax.psum(grad, _AXIS)
    return jax.lax.psum_scatter(grad, _AXIS, scatter_dimension=spec.index(_AXIS), tiled=True)
