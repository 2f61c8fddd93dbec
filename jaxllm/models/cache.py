"""The key/value cache of decoding: preallocated, passed in and returned, never repeated to query heads.

Arrays are per layer and head-major, [B, K, S, H]: a step then updates each in place under donation and reads a head's
keys contiguously. Slots are shared by the rows of a batch; `positions` says which token of its row a slot holds, so
that ragged prompts leave holes instead of shifting. The layout is known to `write` and `attend` only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class KVCache(NamedTuple):
    """Keys and values of the tokens so far.

    Attributes:
        keys: per layer [B, K, S, H], rotated.
        values: per layer [B, K, S, H].
        positions: position of the token in each slot [B, S]; -1 is an empty slot or padding.
        slot: next slot to write, the same for all rows.
    """

    keys: tuple[Float[Array, "B K S H"], ...]
    values: tuple[Float[Array, "B K S H"], ...]
    positions: Int[Array, "B S"]
    slot: Int[Array, ""]


def init_cache(*, batch: int, capacity: int, num_layers: int, num_kv_heads: int, head_dim: int, dtype: Any) -> KVCache:
    """An empty cache of `capacity` slots."""
    shape = (batch, num_kv_heads, capacity, head_dim)
    return KVCache(
        keys=tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)),
        values=tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)),
        positions=jnp.full((batch, capacity), -1, jnp.int32),
        slot=jnp.zeros((), jnp.int32),
    )


def write(
    store: Float[Array, "B K S H"], new: Float[Array, "B T K H"], slot: Int[Array, ""]
) -> Float[Array, "B K S H"]:
    """Puts T new entries at slots slot..slot+T-1; the caller has checked that they fit (XLA would clamp)."""
    return jax.lax.dynamic_update_slice_in_dim(store, jnp.swapaxes(new, 1, 2).astype(store.dtype), slot, axis=2)


def attend(
    query: Float[Array, "B N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    *,
    visible: Array,
    scale: float,
    bias: Float[Array, "#B N S"] | None = None,
) -> Float[Array, "B N H"]:
    """Attention of one query per row over the slots where `visible` [B, S] is True.

    Multiply-and-sum instead of a dot: with one query both are bound by reading the cache, and XLA fuses these.
    """
    batch, heads, width = query.shape
    kv_heads = keys.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, 1, width).astype(jnp.float32)
    scores = scale * jnp.sum(grouped * keys[:, :, None].astype(jnp.float32), axis=-1)  # [B, K, G, S]
    if bias is not None:
        scores += bias.reshape(bias.shape[0], kv_heads, heads // kv_heads, -1).astype(jnp.float32)
    mask = visible[:, None, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1)
    weights = jnp.where(mask, weights, 0).astype(query.dtype).astype(jnp.float32)
    mixed = jnp.sum(weights[..., None] * values[:, :, None].astype(jnp.float32), axis=-2)  # [B, K, G, H]
    return mixed.astype(query.dtype).reshape(batch, heads, width)


def visible_slots(positions: Int[Array, "B S"], query: Int[Array, " B"], *, window: int | None = None) -> Array:
    """Slots that hold a token not after the query's position, and within the window."""
    seen = (positions >= 0) & (positions <= query[:, None])
    return seen if window is None else seen & (query[:, None] - positions < window)
