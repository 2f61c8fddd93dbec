"""Llama's decoding half: prompts into a cache, then one or several tokens at a time.

Pure functions on the decoding layout: one NamedTuple per layer instead of stacks, cast once, with q, k, v and gate, up
as one matrix each, so that a step reads every weight once and in few kernels. Layers are unrolled, because a scan
over stacked weights would slice (copy) them at every step. Out of scope: training, choosing tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.config import LlamaConfig
from jaxllm.models import cache as kv
from jaxllm.models.cache import KVCache
from jaxllm.models.layers import ACTIVATIONS, site, unstack
from jaxllm.ops.attention import attention
from jaxllm.ops.masks import Pattern
from jaxllm.ops.matrices import Matrix, Rows, project, stored
from jaxllm.ops.norms import rms_norm
from jaxllm.ops.rope import apply_rope, rope_cos_sin, rope_frequencies

Rope = tuple[Float[Array, "#B T P"], Float[Array, "#B T P"]]
Mix = Callable[[Array, Array, Array], Array]  # query, new keys, new values -> mixed values


class Projection(NamedTuple):
    """x @ kernel (+ bias)."""

    kernel: Matrix
    bias: Array | None

    def __call__(self, x: Array) -> Array:
        """Maps the last axis; a bias joins the accumulator before it is rounded, as in training."""
        if self.bias is None:
            return project(x, self.kernel)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return (project(x, self.kernel, dtype=wide) + self.bias.astype(wide)).astype(x.dtype)


class LayerParams(NamedTuple):
    """One layer; `qkv` and `gate_up` are concatenated on the output axis, head norms are None without qk_norm."""

    attn_norm: Array
    qkv: Projection
    q_norm: Array | None
    k_norm: Array | None
    out: Projection
    mlp_norm: Array
    gate_up: Projection
    down: Projection


class LlamaParams(NamedTuple):
    """The decoding layout of a Llama; the head is the embedding itself when tied and not quantised."""

    embed: Float[Array, "V D"]
    layers: tuple[LayerParams, ...]
    final_norm: Float[Array, " D"]
    head: Matrix


def prepare_for_decode(params: dict[str, Any], *, dtype: Any, int8: bool = False) -> LlamaParams:
    """The decoding layout of training parameters, in the compute dtype.

    Args:
        params: as `init_params` or a checkpoint holds them.
        dtype: of the weights that are not quantised, and of the computation.
        int8: store all matrices but the embedding as int8 with a float32 scale per output channel.
    """
    store = functools.partial(stored, dtype=dtype, int8=int8)

    def joined(layer: dict[str, Any], *names: str) -> Projection:
        kernel, bias = ([layer[name][part] for name in names if part in layer[name]] for part in ("kernel", "bias"))
        return Projection(store(jnp.concatenate(kernel, axis=1)), jnp.concatenate(bias).astype(dtype) if bias else None)

    def norm(tree: dict[str, Any], name: str) -> Array | None:
        return tree[name]["weight"].astype(dtype) if name in tree else None

    layers = tuple(
        LayerParams(
            attn_norm=layer["attn_norm"]["weight"].astype(dtype),
            qkv=joined(layer, "q_proj", "k_proj", "v_proj"),
            q_norm=norm(layer, "q_norm"),
            k_norm=norm(layer, "k_norm"),
            out=joined(layer, "o_proj"),
            mlp_norm=layer["mlp_norm"]["weight"].astype(dtype),
            gate_up=joined(layer, "gate_proj", "up_proj"),
            down=joined(layer, "down_proj"),
        )
        for layer in unstack(params["layers"])
    )
    embed = params["embed"].astype(dtype)
    tied = "lm_head" not in params
    head = Rows(embed) if tied and not int8 else store(params["embed" if tied else "lm_head"].T)
    return LlamaParams(embed, layers, params["final_norm"]["weight"].astype(dtype), head)


def prefill(
    config: LlamaConfig,
    params: LlamaParams,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    *,
    capacity: int,
    length: int | None = None,
    dtype: Any = None,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Logits of the token after each prompt, and the cache.

    Args:
        config: architecture.
        params: decoding layout.
        tokens: prompts, padded on the right.
        lengths: real tokens of each row, at least 1.
        capacity: slots of the cache; a sliding window needs no more than it is wide, and then wraps around.
        length: context length that dynamic and longrope scaling assume; None is `capacity`.
        dtype: of the cache; None is that of the parameters.

    Raises:
        ValueError: when the prompt exceeds the capacity and no window lets its beginning go.
    """
    c = config
    batch, count = tokens.shape
    if count > capacity and (c.sliding_window is None or capacity != c.sliding_window):
        raise ValueError(f"prompt of {count} tokens exceeds the cache's capacity of {capacity}; raise capacity")
    index = jnp.arange(count)[None]
    pattern = Pattern(causal=True, window=c.sliding_window, query_lengths=lengths, key_lengths=lengths)
    rope = _rope(c, index, length or capacity)
    cache = kv.init_cache(
        batch=batch,
        capacity=capacity,
        num_layers=c.num_layers,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        dtype=dtype or params.embed.dtype,
    )
    # A cache that may wrap around holds each prompt's last tokens, oldest first, so that the oldest is replaced first.
    wraps = c.sliding_window is not None and capacity <= c.sliding_window
    held = min(count, capacity)
    kept = jnp.arange(held, dtype=jnp.int32)[None] + jnp.where(wraps, lengths - held, 0)[:, None]
    columns = jnp.maximum(kept, 0)

    def put(store: kv.Store, new: Array) -> kv.Store:
        last = jnp.take_along_axis(new, columns[:, :, None, None], axis=1) if wraps else new
        return kv.write(store, last, cache.slot)

    def look(query: Array, key: Array, value: Array, *_: kv.Store | None) -> Array:
        return attention(query, key, value, pattern=pattern, scale=c.head_dim**-0.5, implementation=c.attention)

    x, keys, values = _through_cache(c, params, cache, tokens, rope, put, look)
    real = (kept >= 0) & (kept < lengths[:, None])
    seen = cache.positions.at[:, : kept.shape[1]].set(jnp.where(real, kept, -1))
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    cache = KVCache(keys, values, seen, jnp.asarray(kept.shape[1], jnp.int32))
    return _logits(c, params, last)[:, 0], cache


def decode_step(
    config: LlamaConfig,
    params: LlamaParams,
    cache: KVCache,
    tokens: Int[Array, " B"],
    positions: Int[Array, " B"],
    *,
    length: int | None = None,
    attended: int | None = None,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Appends one token per row, all in the same slot, and returns the logits of the next.

    Args:
        config: architecture.
        params: decoding layout.
        cache: from `prefill` or an earlier step.
        tokens: one per row.
        positions: of those tokens in their rows.
        length: as in `prefill`.
        attended: read only so many first slots; the caller knows that the rest is empty. None reads all.
    """
    capacity = cache.positions.shape[1]
    slot = cache.slot % capacity
    seen = jax.lax.dynamic_update_slice_in_dim(cache.positions, positions[:, None], slot, axis=1)
    visible = kv.visible_slots(seen[:, :attended], positions, window=config.sliding_window)

    def put(store: kv.Store, new: Array) -> kv.Store:
        return kv.write(store, new, slot)

    def look(query: Array, key: Array, value: Array, keys: kv.Store, values: kv.Store | None) -> Array:
        return kv.attend(query[:, 0], keys, values, visible=visible, scale=config.head_dim**-0.5)[:, None]

    rope = _rope(config, positions[:, None], length or capacity)
    x, keys, values = _through_cache(config, params, cache, tokens[:, None], rope, put, look)
    return _logits(config, params, x)[:, 0], KVCache(keys, values, seen, cache.slot + 1)


def extend(
    config: LlamaConfig,
    params: LlamaParams,
    cache: KVCache,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    *,
    length: int | None = None,
) -> tuple[Float[Array, "B T V"], KVCache]:
    """Appends T tokens per row, each in the slot of its own position, and returns the logits after each.

    Rows may advance by different counts: what a later call feeds at a position replaces what was there, and nothing
    sees beyond its own position. Needs a cache that does not wrap around.
    """
    rows = jnp.arange(tokens.shape[0])[:, None]
    seen = cache.positions.at[rows, positions].set(positions, mode="drop")
    visible = kv.visible_slots(seen, positions, window=config.sliding_window)

    def put(store: kv.Store, new: Array) -> kv.Store:
        return kv.write_at(store, new, positions)

    def look(query: Array, key: Array, value: Array, keys: kv.Store, values: kv.Store | None) -> Array:
        return kv.attend_many(query, keys, values, visible=visible, scale=config.head_dim**-0.5)

    rope = _rope(config, positions, length or cache.positions.shape[1])
    x, keys, values = _through_cache(config, params, cache, tokens, rope, put, look)
    return _logits(config, params, x), KVCache(keys, values, seen, cache.slot)


def _through_cache(
    config: LlamaConfig, params: LlamaParams, cache: KVCache, tokens: Array, rope: Rope, put: Callable, look: Callable
) -> tuple[Array, tuple[Any, ...], tuple[Any, ...]]:
    """Hidden states, keys and values; `look` gets a layer's new query, key and value and what the cache then holds."""
    x, keys, values = params.embed[tokens], [], []
    for i, layer in enumerate(params.layers):

        def mix(query: Array, key: Array, value: Array, i: int = i) -> Array:
            both = kv.put(put, cache.keys[i], cache.values[i], key, value)
            keys.append(both[0])
            values.append(both[1])
            return look(query, key, value, *both)

        with jax.named_scope(f"layers/{i}"):
            x = _layer(config, layer, x, rope, mix)
    return x, tuple(keys), tuple(values)


def _layer(config: LlamaConfig, layer: LayerParams, x: Float[Array, "B T D"], rope: Rope, mix: Mix) -> Array:
    c, x = config, site(x, "input")
    fused = layer.qkv(rms_norm(x, layer.attn_norm, eps=c.norm_eps))
    heads = fused.reshape(*x.shape[:2], c.num_heads + 2 * c.num_kv_heads, c.head_dim)
    query, key, value = jnp.split(heads, [c.num_heads, c.num_heads + c.num_kv_heads], axis=2)
    if layer.q_norm is not None and layer.k_norm is not None:
        query, key = rms_norm(query, layer.q_norm, eps=c.norm_eps), rms_norm(key, layer.k_norm, eps=c.norm_eps)
    query, key = site(apply_rope(query, *rope), "query"), site(apply_rope(key, *rope), "key")
    mixed = site(mix(query, key, site(value, "value")), "heads")
    x = site(x + site(layer.out(mixed.reshape(*x.shape[:2], -1)), "attention_output"), "after_attention")
    gate, up = jnp.split(layer.gate_up(rms_norm(x, layer.mlp_norm, eps=c.norm_eps)), 2, axis=-1)
    neurons = site(ACTIVATIONS[c.activation](site(gate, "gate")) * site(up, "up"), "neurons")
    return site(x + site(layer.down(neurons), "mlp_output"), "after_mlp")


def _logits(config: LlamaConfig, params: LlamaParams, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    return project(rms_norm(x, params.final_norm, eps=config.norm_eps), params.head, dtype=jnp.float32)


def _rope(config: LlamaConfig, positions: Int[Array, "#B T"], length: int) -> Rope:
    frequencies, scaling = rope_frequencies(
        config.rope, head_dim=config.head_dim, max_length=config.max_length, length=length
    )
    return rope_cos_sin(positions, frequencies, scaling)
