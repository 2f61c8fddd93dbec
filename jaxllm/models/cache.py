"""The key/value caches of decoding: preallocated, passed in and returned, never repeated to query heads.

Arrays are per layer and head-major, [R, S, H], where R = B * K counts the heads of row 0, then those of row 1. A step
updates each in place under donation and reads a head's keys contiguously. (With axes B and K apart, XLA:CPU drops a
batch of 1 in its matmuls, and copies the whole cache for that.) On a GPU a layer of a single row has one store for
both, [2K, S, H] with the keys before the values: a step updates it in one kernel instead of two. `positions` holds the
position of each slot's token. Ragged prompts leave holes instead of shifting, and a sliding window can wrap around.
Only this module and T5's prefill, which makes a `CrossCache`, depend on the layout.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllm.models.functions import Attend, Pairs
from jaxllm.ops import backend
from jaxllm.ops.stored import Quantized, quantize

# Keys or values of one layer, quantised over H; [B, N, S, H] in a cross cache, which is only read.
Store = Float[Array, "R S H"] | Float[Array, "B N S H"] | Quantized
Stores = tuple[Store, Store | None]  # of keys and of values; None where the first holds both
Read = tuple[Array, Array | None]  # [R, A, H], and the scales [R, A] of a quantised store


class KVCache(NamedTuple):
    """Keys and values of the tokens so far."""

    keys: tuple[Any, ...]  # per layer [B * K, S, H], rotated; or [2K, S, H] with the values behind the keys
    values: tuple[Any, ...]  # per layer [B * K, S, H]; or None where `keys` holds them
    positions: Int[Array, "B S"]  # of the token in each slot; -1 is an empty slot or padding
    slot: Int[Array, ""]  # tokens written so far, the same for all rows; the next one's slot is slot % S


class Update(NamedTuple):
    """The changes of one call in a cache: `write(store, new [B, T, K, H])`, and `positions` and `slot` afterwards."""

    write: Callable[[Store, Array], Store]
    positions: Int[Array, "B S"]
    slot: Int[Array, ""]


class Turn(NamedTuple):
    """One call on a cache that holds a prompt."""

    update: Update
    pairs: Pairs  # queries of the new tokens, and the slots that they see
    attend: Callable[..., Array]  # (queries, keys, values, pairs, scale=) -> mixed values, on a layer's stores


class CrossCache(NamedTuple):
    """Keys and values of the encoder's output per decoder layer, made once, and its tokens that are not padding."""

    keys: tuple[Float[Array, "B N S H"], ...]
    values: tuple[Float[Array, "B N S H"], ...]
    visible: Bool[Array, "B S"]


def init_cache(*, batch: int, capacity: int, num_layers: int, num_kv_heads: int, head_dim: int, dtype: Any) -> KVCache:
    """An empty cache of `capacity` slots; dtype int8 stores it quantised."""
    joined = backend.joins_keys_and_values(batch)
    shape = (batch * num_kv_heads * (2 if joined else 1), capacity, head_dim)

    def store() -> Store:
        values = jnp.zeros(shape, dtype)
        return Quantized(values, jnp.zeros(shape[:-1], jnp.float32)) if values.dtype == jnp.int8 else values

    return KVCache(
        keys=tuple(store() for _ in range(num_layers)),
        values=tuple(None if joined else store() for _ in range(num_layers)),
        positions=jnp.full((batch, capacity), -1, jnp.int32),
        slot=jnp.zeros((), jnp.int32),
    )


def fill(cache: KVCache, lengths: Int[Array, " B"], count: int, *, window: int | None = None) -> Update:
    """Prompts into an empty cache: `count` columns; the first `lengths` of a row are real.

    A cache at most as wide as the window may wrap around. It holds each prompt's last tokens, oldest first, so that the
    oldest is replaced first. ValueError when prompts exceed the capacity and no window drops their beginning.
    """
    capacity = cache.positions.shape[1]
    if count > capacity and capacity != window:
        raise ValueError(f"prompt of {count} tokens exceeds the cache's capacity of {capacity}; raise capacity")
    wraps = window is not None and capacity <= window
    held = min(count, capacity)
    kept = jnp.arange(held, dtype=jnp.int32)[None] + jnp.where(wraps, lengths - held, 0)[:, None]
    columns = jnp.maximum(kept, 0)

    def write_last(store: Store, new: Array) -> Store:
        last = jnp.take_along_axis(new, columns[:, :, None, None], axis=1) if wraps else new
        return write(store, last, cache.slot)

    real = (kept >= 0) & (kept < lengths[:, None])
    positions = cache.positions.at[:, :held].set(jnp.where(real, kept, -1))
    return Update(write_last, positions, jnp.asarray(held, jnp.int32))


def append(
    cache: KVCache,
    positions: Int[Array, " B"],
    custom: Attend | None,
    *,
    wraps: bool = False,
    window: int | None = None,
    attended: int | None = None,
) -> Turn:
    """One token per row, all in the next slot; if the cache `wraps` around, the first slot follows the last.

    Attention, or `custom` in its place, reads the first `attended` slots, or all; the others must be empty.
    """
    slot = cache.slot % cache.positions.shape[1] if wraps else cache.slot
    held = jax.lax.dynamic_update_slice_in_dim(cache.positions, positions[:, None], slot, axis=1)
    update = Update(lambda store, new: write(store, new, slot), held, cache.slot + 1)
    pairs = visible_pairs(held[:, :attended], positions[:, None], window=window)
    return Turn(update, pairs, _attend_by(custom))


def write(store: Store, new: Float[Array, "B T K H"], slot: Int[Array, ""]) -> Store:
    """Puts T new entries at slots slot..slot+T-1; the caller has checked that they fit (XLA would clamp)."""
    heads_first = jnp.swapaxes(new, 1, 2).reshape(-1, new.shape[1], new.shape[3])  # [R, T, H]
    entries = quantize(heads_first, axis=-1) if isinstance(store, Quantized) else heads_first.astype(store.dtype)
    put_one = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=1)
    return jax.tree.map(put_one, store, entries)


def write_both(stores: Stores, key: Array, value: Array, update: Update) -> Stores:
    """A layer's stores with the new keys and values [B, T, K, H]."""
    keys, values = stores
    if values is None:  # one store for both
        return update.write(keys, jnp.concatenate([key, value], axis=2)), None
    return update.write(keys, key), update.write(values, value)


def attend_one(
    query: Float[Array, "B 1 N H"], keys: Store, values: Store | None, pairs: Pairs, *, scale: float
) -> Float[Array, "B 1 N H"]:
    """Attention of one query per row over the mask's first A slots.

    Reading the cache bounds both matmuls, see `backend.attends_by_matmul`.
    """
    batch, _, heads, width = query.shape
    (keys, key_scale), (values, value_scale) = _read_both(keys, values, batch, pairs.mask.shape[2])
    kv_heads = keys.shape[0] // batch
    by_row = (batch, kv_heads, heads // kv_heads, -1)
    grouped = query.reshape(keys.shape[0], -1, width).astype(jnp.float32)  # [R, G, H]
    dots = backend.attends_by_matmul(keys.dtype, values.dtype)
    if dots:
        scores = _scores_by_dot(grouped, keys)
    else:
        scores = jnp.sum(grouped[:, :, None] * keys[:, None].astype(jnp.float32), axis=-1)  # [R, G, A]
    scores = scale * scores.reshape(by_row)
    if key_scale is not None:
        scores *= key_scale.reshape(batch, kv_heads, 1, -1)
    if pairs.bias is not None:
        scores += pairs.bias.reshape(pairs.bias.shape[0], *by_row[1:]).astype(jnp.float32)
    mask = pairs.mask[:, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min), axis=-1)
    weights = jnp.where(mask, weights, 0).astype(query.dtype).astype(jnp.float32)
    weights = weights.reshape(keys.shape[0], heads // kv_heads, -1)
    if value_scale is not None:
        weights *= value_scale[:, None]
    if dots:
        mixed = jnp.einsum("rgs,rsh->rgh", weights, values)
    else:
        mixed = jnp.sum(weights[..., None] * values[:, None].astype(jnp.float32), axis=-2)  # [R, G, H]
    return mixed.astype(query.dtype).reshape(query.shape)


def _scores_by_dot(query: Float[Array, "R G H"], keys: Float[Array, "R A H"]) -> Float[Array, "R G A"]:
    if backend.attends_one_head_at_a_time(query.shape[1]):
        return jnp.stack([jnp.einsum("rsh,rh->rs", keys, one) for one in jnp.unstack(query, axis=1)], axis=1)
    # The keys first, as in `ops.stored`.
    return jax.lax.optimization_barrier(jnp.einsum("rsh,rgh->rsg", keys, query)).swapaxes(1, 2)


def _attend_by(custom: Attend | None) -> Callable[..., Array]:
    """`attend_one`, or a model's custom attention, which includes its scale."""
    if custom is None:
        return attend_one

    def attend(query: Array, keys: Store, values: Store | None, pairs: Pairs, *, scale: float) -> Array:
        return custom(query, *plain_stores(keys, values, query, pairs), pairs)

    return attend


def plain_stores(keys: Store, values: Store | None, query: Array, pairs: Pairs) -> tuple[Array, Array]:
    """Keys and values [B, A, K, H] in the query's dtype."""

    def plain(store: Array, scale: Array | None) -> Array:
        if scale is not None:
            store = store.astype(jnp.float32) * scale[..., None]
        return jnp.swapaxes(store.reshape(query.shape[0], -1, *store.shape[1:]), 1, 2).astype(query.dtype)

    key, value = _read_both(keys, values, query.shape[0], pairs.mask.shape[2])
    return plain(*key), plain(*value)


def _read_both(keys: Store, values: Store | None, batch: int, count: int) -> tuple[Read, Read]:
    if values is not None:
        return _read(keys, count), _read(values, count)

    def half(which: int) -> Read:
        by_row = jax.tree.map(lambda x: x.reshape(batch, 2, -1, *x.shape[1:])[:, which], keys)
        return _read(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), by_row), count)

    return half(0), half(1)


def _read(store: Store, count: int) -> Read:
    """[R, A, H] of the first A slots, and the scales [R, A] of a quantised store."""
    if isinstance(store, Quantized):
        return store.values[:, :count], store.scale[:, :count]
    return store.reshape(-1, *store.shape[-2:])[:, :count], None


def visible_pairs(positions: Int[Array, "B S"], query: Int[Array, "B T"], *, window: int | None = None) -> Pairs:
    """Queries at positions, and the slots that hold a token up to theirs and within the window."""
    slots = positions[:, None]
    seen = (slots >= 0) & (slots <= query[..., None])
    if window is not None:
        seen &= query[..., None] - slots < window
    return Pairs(seen, query, positions)


def repeat_rows(cache: KVCache, times: int) -> KVCache:
    """Each row `times` times in succession: samples or beams of one prompt share its prefill."""
    batch = cache.positions.shape[0]

    def repeat(store: Array) -> Array:
        repeated = jnp.repeat(store.reshape(batch, -1, *store.shape[1:]), times, axis=0)
        return repeated.reshape(-1, *store.shape[1:])

    keys, values = jax.tree.map(repeat, (cache.keys, cache.values))
    return KVCache(keys, values, jnp.repeat(cache.positions, times, axis=0), cache.slot)


def repeat_tree(tree: Any, times: int) -> Any:
    """Each row of every array `times` times in succession."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), tree)


def reorder_rows(cache: KVCache, rows: Int[Array, " B"], *, start: int) -> KVCache:
    """Row i takes over row rows[i] from slot `start` on; the slots before must be equal (one prompt)."""

    def move(store: Array) -> Array:
        latest = store[:, start:]
        moved = jnp.take(latest.reshape(rows.shape[0], -1, *latest.shape[1:]), rows, axis=0).reshape(latest.shape)
        return jax.lax.dynamic_update_slice_in_dim(store, moved, start, axis=1)

    keys, values = jax.tree.map(move, (cache.keys, cache.values))
    return cache._replace(keys=keys, values=values)
