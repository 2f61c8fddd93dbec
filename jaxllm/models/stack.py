"""Loops over a stack of equal layers: in training and scoring, and through a cache.

Parameters of all layers of a stack are one tree with a leading axis L, whichever way the loop is compiled: `scan`
compiles a layer once, `unroll` compiles them all and lets XLA fuse across them. Decoding rearranges the tree into a
tuple of layers and unrolls, because a scan over stacked weights would slice (copy) them at every step. On several
devices a leaf of the tree may be a `Share`, which is gathered inside each layer. Out of scope: what a layer computes.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from jaxllm.models import cache as kv
from jaxllm.models.cache import KVCache
from jaxllm.models.layers import KEPT, Params
from jaxllm.ops.stored import Matrix, Rows, stored

Hold = Callable[[Array, Array], kv.Stores]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["shard"], meta_fields=["gather"])
@dataclasses.dataclass(frozen=True)
class Share:  # not a NamedTuple, because `gather` is not an array
    """A device's part of a leaf of a stack (`jaxllm.training.sharding`); `gather` makes that of one layer whole."""

    shard: Any  # an array, or its shape
    gather: Callable[[Array], Array]


def is_share(leaf: Any) -> bool:
    """Whether a leaf is a `Share`; the `is_leaf` of jax's functions of trees."""
    return isinstance(leaf, Share)


def whole(params: Any) -> Any:
    """Parameters of one layer with all shares gathered, also for a family with a loop of its own."""
    return jax.tree.map(lambda leaf: leaf.gather(leaf.shard) if is_share(leaf) else leaf, params, is_leaf=is_share)


def create_stack(module: nn.Module, init_layer: Callable[[Array], Params], num_layers: int) -> None:
    """Creates a module's parameters `layers`, those of equal layers on a new leading axis, and checks their number."""
    # Not by module.param alone: it would trace the initialiser again.
    if not module.has_variable("params", "layers"):
        module.param("layers", lambda key: jax.vmap(init_layer)(jax.random.split(key, num_layers)))
    found = jax.tree.leaves(module.get_variable("params", "layers"))[0].shape[0]
    if found != num_layers:
        raise ValueError(f"the parameters hold {found} layers, the model's config has {num_layers}: use the same model")


def unstack(params: Any) -> list[Any]:
    """The single layers of a stacked tree; `lax.split`, because its transpose is one concatenation."""
    leaves, structure = jax.tree.flatten(params)
    count = leaves[0].shape[0]
    parts = [jax.lax.split(leaf, [1] * count, axis=0) for leaf in leaves]
    return [jax.tree.unflatten(structure, [part[i][0] for part in parts]) for i in range(count)]


def apply_stack(
    layer: Callable[..., Array],
    params: Params,
    x: Float[Array, "B T D"],
    per_layer: Any = None,
    *,
    mode: str,
    remat: str,
) -> Float[Array, "B T D"]:
    """Runs x through `layer(params[i], x, per_layer[i])` for every i; `mode` is scan or unroll.

    `params` and `per_layer` (such as keys, or None) are trees with a leading axis L; `remat` is none, elementwise, dots
    or full. Shares are gathered inside the layer, once more in the backward pass.
    """
    if any(map(is_share, jax.tree.leaves(params, is_leaf=is_share))):
        layer = functools.partial(_gathering, layer)
        remat = "gathers" if remat == "none" else remat
    body = layer if remat == "none" else jax.checkpoint(layer, policy=_POLICIES[remat])
    if mode == "scan":
        return jax.lax.scan(lambda h, part: (body(part[0], h, part[1]), None), x, (params, per_layer))[0]
    count = jax.tree.leaves(params)[0].shape[0]
    extras = unstack(per_layer) if per_layer is not None else [None] * count
    for i, (layer_params, extra) in enumerate(zip(unstack(params), extras, strict=True)):
        with jax.named_scope(str(i)):  # profiles and `jaxllm.study` read it
            x = body(layer_params, x, extra)
    return x


def _gathering(layer: Callable[..., Array], params: Params, x: Array, extra: Any) -> Array:
    return layer(whole(params), x, extra)


def _is_fused_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    """A fused kernel's output and softmax statistics: neither a dot nor named, and without them it would run twice."""
    return primitive.name.startswith("dot_product_attention_fwd")


def _is_not_gathered(_: Any, *__: Any, **params: Any) -> bool:
    """Everything but a gathered parameter: its function has a derivative rule, as others do, with a gather inside."""
    return all(each.primitive.name != "all_gather" for each in getattr(params.get("call_jaxpr"), "eqns", ()))


_policies = jax.checkpoint_policies
_POLICIES = {
    "full": _policies.nothing_saveable,
    "elementwise": _policies.save_from_both_policies(_policies.save_only_these_names(*KEPT), _is_fused_attention),
    "dots": _policies.save_from_both_policies(_policies.dots_with_no_batch_dims_saveable, _is_fused_attention),
    "gathers": _is_not_gathered,  # of shares where `remat` is none
}


def embed_and_head(params: Params, *, dtype: Any, int8: bool) -> tuple[Float[Array, "V D"], Matrix]:
    """Embedding and head for decoding: one array when they are tied and not quantised."""
    embed, tied = params["embed"].astype(dtype), "lm_head" not in params
    if tied and not int8:
        return embed, Rows(embed)
    return embed, stored(params["embed" if tied else "lm_head"].T, dtype=dtype, int8=int8)


def decode_stack(
    layer: Callable[[Any, Array, Hold], Array],
    params: Sequence[Any],
    x: Float[Array, "B T D"],
    cache: KVCache,
    update: kv.Update,
    *,
    scope: str,
) -> tuple[Float[Array, "B T D"], KVCache]:
    """Runs x through `layer(params[i], x, hold)` for every i; returns it and the updated cache.

    In a layer, `hold(key, value)` writes its new keys and values and returns its stores. `scope` names the stack in
    profiles and for `jaxllm.study`.
    """
    held: list[kv.Stores] = []

    def hold(stores: kv.Stores, key: Array, value: Array) -> kv.Stores:
        held.append(kv.write_both(stores, key, value, update))
        return held[-1]

    for i, (each, *stores) in enumerate(zip(params, cache.keys, cache.values, strict=True)):
        with jax.named_scope(f"{scope}/{i}"):
            x = layer(each, x, functools.partial(hold, tuple(stores)))
    keys, values = zip(*held, strict=True)
    return x, KVCache(keys, values, update.positions, update.slot)
