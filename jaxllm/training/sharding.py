"""How a run is laid out over devices: rows of a batch over all of them, parameters and moments over `fsdp` of them.

The mesh has the axes data, fsdp and tensor. The devices along `fsdp` share one copy of the state, and those along
`data` hold copies; `tensor` is 1. The name of a leaf decides whether it is split (`jaxllm.training.names`), also in the
optimizer's trees, whose paths end in the parameters' paths.

Every device computes its rows as on a single device; docs/design.md has the reasons. A layer's parameters are gathered
inside the layer, and again in its backward pass (`jaxllm.models.stack.Share`); those outside the stacks are gathered
before the loss. A gradient is summed over the shares where its layer ends, and over the copies once per step. The loss
scale gets the sums, so all devices skip the same steps. Out of scope: tensor and pipeline parallelism.

docs/cluster.md has a training loop on all devices.
`Checkpoints.restore(with_shardings(program.abstract_state(), mesh))` restores a state onto another mesh.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.extend import random as extend
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array, Int

from jaxllm.models.stack import Share, is_share, whole
from jaxllm.ops.linear import custom_vjp
from jaxllm.training.names import is_stacked, role_of
from jaxllm.training.precision import cast_floating

AnyMesh = Mesh | AbstractMesh  # the second is enough to trace or estimate a program
AXES = ("data", "fsdp", "tensor")
_ROW_AXES = ("data", "fsdp")
_COPIED, _ROWS = PartitionSpec(), PartitionSpec(_ROW_AXES)


def make_mesh(devices: Sequence[Any] | None = None, *, fsdp: int | None = None) -> Mesh | None:
    """All devices (or those given), so many to a copy of the state; None for a single device, which needs no layout.

    Without `fsdp`, those of a node share a copy, because links between nodes are slower.

    Raises:
        ValueError: when `fsdp` does not divide their number.
    """
    devices = list(jax.devices() if devices is None else devices)
    nodes = len({getattr(device, "slice_index", device.process_index) for device in devices})
    fsdp = fsdp or len(devices) // (nodes if len(devices) % nodes == 0 else 1)
    if len(devices) % fsdp:
        fix = f"use a divisor such as {max(n for n in range(1, fsdp) if len(devices) % n == 0)}, or null"
        raise ValueError(f"sharding.fsdp {fsdp} does not divide the number of devices, {len(devices)}; {fix}")
    return Mesh(np.array(devices).reshape(-1, fsdp, 1), AXES) if len(devices) > 1 else None


def shares_of(mesh: AnyMesh | None) -> int:
    """Devices that share one copy of the state."""
    return 1 if mesh is None else mesh.shape["fsdp"]


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
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), state_specs(tree, shares_of(mesh)))


def state_specs(tree: Any, shares: int) -> Any:
    """Which axis of every leaf is split into so many shares: of a matrix the first that they divide."""

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        # Factored moments have the names of matrices without their shapes.
        matrix = role_of(path).split and leaf.ndim == 2 + is_stacked(path)
        axis = next((axis for axis in (-2, -1) if matrix and leaf.shape[axis] % shares == 0), None)
        if shares == 1 or axis is None:
            return _COPIED
        return PartitionSpec(*[None] * (leaf.ndim + axis), "fsdp")

    return jax.tree_util.tree_map_with_path(spec, tree)


def with_shardings(tree: Any, mesh: Mesh | None) -> Any:
    """An abstract tree with the sharding of each leaf, for restoring a checkpoint."""
    shardings = state_shardings(tree, mesh)
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, shardings)


def device_bytes(tree: Any, shares: int) -> int:
    """Bytes of all leaves on each of so many devices that share a copy."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(state_specs(tree, shares)), strict=True)
    return sum(leaf.size * leaf.dtype.itemsize // (shares if "fsdp" in spec else 1) for leaf, spec in leaves)


def row_sharding(mesh: Mesh) -> NamedSharding:
    """The layout of a batch over the devices of a mesh, by rows."""
    return NamedSharding(mesh, _ROWS)


def local_rows(batch_size: int) -> range:
    """The rows of a batch that are on the devices of this process; jax lists devices process by process."""
    rows = batch_size // jax.process_count()
    return range(jax.process_index() * rows, (jax.process_index() + 1) * rows)


def place_rows(batch: Mapping[str, Any], mesh: Mesh | None, *, local: bool = False) -> dict[str, jax.Array]:
    """A batch on its devices, rows in order; the copy continues after this returns.

    Of several processes each passes the whole batch, or with `local` its `local_rows` alone.
    """
    at = None if mesh is None else row_sharding(mesh)
    if local:
        at = at or SingleDeviceSharding(jax.devices()[0])
        return {name: jax.make_array_from_process_local_data(at, rows) for name, rows in batch.items()}
    if at is None or at.is_fully_addressable:
        return jax.device_put(dict(batch), at)
    return {name: jax.make_array_from_callback(rows.shape, at, rows.__getitem__) for name, rows in batch.items()}


def fetch(tree: Any) -> Any:
    """The values of a tree on the host, whole, on whatever devices they are; of several processes, all must call it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def map_rows(
    function: Callable[..., Any], mesh: AnyMesh | None, *, dtype: Any, combine: Callable[[Any], Any] | None
) -> Callable[..., Any]:
    """function(params, batch, *others) of a batch spread over several devices, from master weights cast to `dtype`.

    `combine` is `sum_gradients`, `total` or `largest` of the devices' results; without it rows are put in order.
    `others` are the same on all devices.
    """

    @functools.wraps(function)
    def spread(params: Any, *others: Any) -> Any:
        if mesh is None:
            return function(cast_floating(params, dtype), *others)
        specs = state_specs(params, shares_of(mesh))

        def on_device(params: Any, *others: Any) -> Any:
            value = function(_shares(params, specs, dtype), *others)
            return value if combine is None else combine(value)

        inputs = (specs, _ROWS, *[_COPIED] * (len(others) - 1))
        output = _ROWS if combine is None else (_COPIED, specs) if combine is sum_gradients else _COPIED
        # Derivatives are taken inside only, so check_vma (which values differ between devices) is not needed.
        shared = jax.shard_map(on_device, mesh=mesh, in_specs=inputs, out_specs=output, check_vma=False)
        return shared(params, *others)

    return spread


def sum_gradients(value: tuple[Any, Any]) -> tuple[Any, Any]:
    """(sums, float32 gradients) of all rows: gradients of what is shared have been summed over `fsdp`."""
    sums, grads = value

    def one(grad: Any) -> jax.Array:
        if not is_share(grad):
            return total(grad)
        return jax.lax.psum(grad.shard, "data") if jax.lax.axis_size("data") > 1 else grad.shard

    return total(sums), jax.tree.map(one, grads, is_leaf=is_share)


def total(value: Any) -> Any:
    """Sums over the devices that have different rows."""
    return jax.lax.psum(value, _ROW_AXES)


def largest(value: Any) -> Any:
    """Maxima over the devices that have different rows, NaN where any is."""

    def one(x: jax.Array) -> jax.Array:  # a maximum over devices may ignore NaN
        bad = total(jnp.isnan(x).astype(jnp.int32)) > 0
        return jnp.where(bad, jnp.nan, jax.lax.pmax(jnp.nan_to_num(x, posinf=jnp.inf), _ROW_AXES))

    return jax.tree.map(one, value)


def device_keys(mesh: AnyMesh | None) -> Callable[[jax.Array], jax.Array]:
    """Maps one key, or those of all microbatches of a batch, to keys of this device's rows in its microbatches."""

    def of_rows(keys: jax.Array) -> jax.Array:
        parts = jax.lax.axis_size(_ROW_AXES)
        mine = jax.lax.axis_index(_ROW_AXES) * keys.size + jnp.arange(keys.size)
        return row_keys(keys.reshape(-1)[mine // parts], mine % parts, parts=parts).reshape(keys.shape)

    return of_rows if mesh is not None else lambda keys: keys


def with_ends(function: Callable[..., Any]) -> Callable[..., Any]:
    """function(params, ...) with what is outside the stacks gathered first; stacks gather their layers themselves."""

    @functools.wraps(function)
    def on_shares(shares: Any, *others: Any) -> Any:
        def end(path: Any, leaf: Any) -> Any:
            return leaf if is_stacked(path) else whole(leaf)

        return function(jax.tree_util.tree_map_with_path(end, shares, is_leaf=is_share), *others)

    return on_shares


def _shares(params: Any, specs: Any, dtype: Any) -> Any:
    """The parameters on a device: shares of those that are split, others in the compute dtype."""

    def share(leaf: jax.Array, spec: PartitionSpec) -> Any:
        if "fsdp" not in spec:
            return cast_floating(leaf, dtype)
        behind = leaf.ndim - spec.index("fsdp")  # without the axis of layers
        return Share(leaf, lambda shard: _gathered(shard, shard.ndim - behind, dtype))

    return jax.tree.map(share, params, specs)


@functools.partial(custom_vjp, nondiff_argnums=(1, 2))
def _gathered(share: jax.Array, axis: int, dtype: Any) -> jax.Array:
    return jax.lax.all_gather(share.astype(dtype), "fsdp", axis=axis, tiled=True)


def _scatter_sum(axis: int, dtype: Any, saved: None, grad: jax.Array) -> tuple[jax.Array]:
    # Master weights are float32, and so are sums of their gradients.
    return (jax.lax.psum_scatter(grad.astype(jnp.float32), "fsdp", scatter_dimension=axis, tiled=True),)


_gathered.defvjp(lambda share, axis, dtype: (_gathered(share, axis, dtype), None), _scatter_sum)


_THREEFRY = "threefry2x32"


def row_keys(keys: Array, part: Int[Array, "*B"], *, parts: int) -> Array:
    """Keys of random draws for a device's part of the rows, so that all devices draw what a single one would.

    A key holds the number of the part. A draw [B, ...] is then rows B * part to B * part + B of what one device would
    draw for all parts, because threefry hashes each element's place on its own (`jax_threefry_partitionable`, jax's
    default). Models split keys and draw from them as on one device. Of other generators, each part has other keys.
    """
    if str(jax.random.key_impl(keys)) != _THREEFRY:
        return jnp.vectorize(jax.random.fold_in)(keys, part)
    words = jnp.concatenate([jax.random.key_data(keys), part[..., None].astype(jnp.uint32)], axis=-1)
    return jax.random.wrap_key_data(words, impl=_generator(parts))


@functools.cache
def _generator(parts: int) -> Any:
    """Threefry with the number of a part, out of so many, as the last word of its keys."""

    def derived(of_plain: Any, key: Array, *what: Any) -> Array:
        plain = jax.random.key_data(of_plain(jax.random.wrap_key_data(key[:2], impl=_THREEFRY), *what))
        return jnp.concatenate([plain, jnp.broadcast_to(key[2], (*plain.shape[:-1], 1))], axis=-1)

    def draw(key: Array, bits: int, shape: tuple[int, ...]) -> Array:
        rows, size = (*shape, 1)[0], math.prod(shape[1:])
        places = np.arange(rows * parts, dtype=np.uint64) * np.uint64(size)  # of each row's first element
        high, low = (jax.lax.dynamic_slice(jnp.asarray(x), (key[2] * rows,), (rows,))[:, None] for x in _words(places))
        inside = jax.lax.iota(jnp.uint32, size)
        low += inside
        high += low < inside
        first, second = (x.reshape(shape) for x in extend.threefry2x32_p.bind(key[0], key[1], high, low))
        if bits == 64:
            return first.astype(jnp.uint64) << 32 | second
        return (first ^ second).astype(f"uint{bits}")

    functions: Any = {"split": functools.partial(derived, jax.random.split), "random_bits": draw}
    functions |= {"fold_in": functools.partial(derived, jax.random.fold_in), "seed": lambda _: jnp.zeros(3, jnp.uint32)}
    return extend.define_prng_impl(key_shape=(3,), **functions)


def _words(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (places >> np.uint64(32)).astype(np.uint32), places.astype(np.uint32)
