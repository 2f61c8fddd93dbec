"""Loops over a stack of equal layers: in training and scoring, and through a cache.

Parameters of all layers of a stack are one tree with a leading axis L, whichever way the loop is compiled: `scan`
compiles a layer once, `unroll` compiles them all and lets XLA fuse across them. The tree is a plain dict that a
layer's `apply` takes slice by slice. Decoding rearranges it into a tuple of layers and unrolls, because a scan over
stacked weights would slice (copy) them at every step. Out of scope: what a layer computes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Array, Float

from jaxllm.models import cache as kv
from jaxllm.models.cache import KVCache
from jaxllm.models.hook_points import KEPT
from jaxllm.models.layers import Params

Hold = Callable[[Array, Array], kv.Stores]


def init_stack(key: Array, init_layer: Callable[[Array], Params], num_layers: int) -> Params:
    """Parameters of `num_layers` equal layers, stacked on a new leading axis."""
    return jax.vmap(init_layer)(jax.random.split(key, num_layers))


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
    """Runs x through `layer(params[i], x, per_layer[i])` for every i.

    Args:
        layer: pure function of one layer's parameters, the residual stream, and what is its own (such as a key).
        params: stacked parameters, leading axis L.
        x: residual stream.
        per_layer: tree with a leading axis L, or None.
        mode: scan or unroll.
        remat: none, elementwise, dots or full.
    """
    body = _rematerialised(layer, remat)
    if mode == "scan":
        return jax.lax.scan(lambda h, part: (body(part[0], h, part[1]), None), x, (params, per_layer))[0]
    count = jax.tree.leaves(params)[0].shape[0]
    extras = unstack(per_layer) if per_layer is not None else [None] * count
    for i, (layer_params, extra) in enumerate(zip(unstack(params), extras, strict=True)):
        with jax.named_scope(str(i)):  # profiles and `jaxllm.study` read it
            x = body(layer_params, x, extra)
    return x


def _rematerialised(layer: Callable[..., Array], remat: str) -> Callable[..., Array]:
    policies = jax.checkpoint_policies
    if remat == "none":
        return layer
    policy = {
        "elementwise": policies.save_from_both_policies(policies.save_only_these_names(*KEPT), _is_fused_attention),
        "dots": policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, _is_fused_attention),
        "full": policies.nothing_saveable,
    }[remat]
    return jax.checkpoint(layer, policy=policy)


def _is_fused_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    """A fused kernel's output and softmax statistics: neither a dot nor named, and without them it would run twice."""
    return primitive.name.startswith("dot_product_attention_fwd")


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

    Args:
        layer: one layer; `hold(key, value)` writes its new keys and values and returns its stores.
        params: of each layer, in the decoding layout.
        x: residual stream.
        cache: before the call.
        update: what the call changes in it.
        scope: name of the stack, for profiles and `jaxllm.study`.
    """
    held: list[kv.Stores] = []

    def hold(keys: kv.Store, values: kv.Store | None, key: Array, value: Array) -> kv.Stores:
        held.append(kv.put(update.write, keys, values, key, value))
        return held[-1]

    for i, (each, keys, values) in enumerate(zip(params, cache.keys, cache.values, strict=True)):
        with jax.named_scope(f"{scope}/{i}"):
            x = layer(each, x, functools.partial(hold, keys, values))
    keys, values = zip(*held, strict=True)
    return x, KVCache(keys, values, update.positions, update.slot)
