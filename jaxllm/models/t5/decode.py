"""T5's decoding half: sources into an immutable cross cache, then targets one or several tokens at a time.

Pure functions on the decoding layout, as for Llama: one NamedTuple per layer, cast once, projections of one input
joined. The encoder's keys and values are computed once per layer in `prefill`; they belong to that batch and are never
written again, so a decode loop closes over them. Out of scope: training, choosing tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.config import T5Config
from jaxllm.models import cache as kv
from jaxllm.models.cache import CrossCache, KVCache
from jaxllm.models.layers import ACTIVATIONS, site, unstack
from jaxllm.models.t5.layer import scale_output, stream_dtype
from jaxllm.ops.attention import attention
from jaxllm.ops.masks import Pattern
from jaxllm.ops.matrices import Matrix, Rows, project, stored
from jaxllm.ops.norms import rms_norm
from jaxllm.ops.relative_bias import relative_bias, relative_bias_at

Table = Float[Array, "R N"]
BiasOf = Callable[[Table], Array]


class AttentionParams(NamedTuple):
    """Attention of a stream over itself; `table` is the layer's own relative bias (UMT5), or None."""

    norm: Array
    qkv: Matrix
    out: Matrix
    table: Table | None


class CrossParams(NamedTuple):
    """Attention over the encoder's output."""

    norm: Array
    query: Matrix
    key_value: Matrix
    out: Matrix


class MLPParams(NamedTuple):
    """`up` is gate and up joined when gated."""

    norm: Array
    up: Matrix
    down: Matrix


class EncoderLayerParams(NamedTuple):
    """One layer of the encoder."""

    attention: AttentionParams
    mlp: MLPParams


class DecoderLayerParams(NamedTuple):
    """One layer of the decoder."""

    attention: AttentionParams
    cross: CrossParams
    mlp: MLPParams


class StackParams(NamedTuple):
    """One stack; `table` is the relative bias that its layers share, or None."""

    layers: tuple[Any, ...]
    table: Table | None
    final_norm: Array


class T5Params(NamedTuple):
    """The decoding layout of a T5; the head is the embedding itself when tied and not quantised."""

    embed: Float[Array, "V D"]
    encoder: StackParams
    decoder: StackParams
    head: Matrix


def prepare_for_decode(params: dict[str, Any], *, dtype: Any, int8: bool = False) -> T5Params:
    """The decoding layout of training parameters, in the compute dtype.

    Args:
        params: as `init_params` or a checkpoint holds them.
        dtype: of the weights that are not quantised, and of the computation.
        int8: store all matrices but the embedding as int8 with a float32 scale per output channel.
    """
    store = functools.partial(stored, dtype=dtype, int8=int8)

    def joined(tree: dict[str, Any], *names: str) -> Matrix:
        kernel = jnp.concatenate([tree[name]["kernel"] for name in names if name in tree], axis=1)
        return store(kernel)

    def cast(tree: dict[str, Any], name: str) -> Array | None:
        return tree[name].astype(dtype) if name in tree else None

    def norm(tree: dict[str, Any], name: str) -> Array:
        return tree[name]["weight"].astype(dtype)

    def attention_of(tree: dict[str, Any]) -> AttentionParams:
        part = tree["attention"]
        qkv, out = joined(part, "q_proj", "k_proj", "v_proj"), joined(part, "o_proj")
        return AttentionParams(norm(tree, "attn_norm"), qkv, out, cast(tree, "relative_bias"))

    def cross_of(tree: dict[str, Any]) -> CrossParams:
        part = tree["cross_attention"]
        query, pair = joined(part, "q_proj"), joined(part, "k_proj", "v_proj")
        return CrossParams(norm(tree, "cross_norm"), query, pair, joined(part, "o_proj"))

    def mlp_of(tree: dict[str, Any]) -> MLPParams:
        part = tree["mlp"]
        return MLPParams(norm(tree, "mlp_norm"), joined(part, "gate_proj", "up_proj"), joined(part, "down_proj"))

    def encoder_layer(tree: dict[str, Any]) -> EncoderLayerParams:
        return EncoderLayerParams(attention_of(tree), mlp_of(tree))

    def decoder_layer(tree: dict[str, Any]) -> DecoderLayerParams:
        return DecoderLayerParams(attention_of(tree), cross_of(tree), mlp_of(tree))

    def stack_of(tree: dict[str, Any], layer_of: Callable[[dict[str, Any]], Any]) -> StackParams:
        layers = tuple(layer_of(layer) for layer in unstack(tree["layers"]))
        return StackParams(layers, cast(tree, "relative_bias"), norm(tree, "final_norm"))

    embed, tied = params["embed"].astype(dtype), "lm_head" not in params
    head = Rows(embed) if tied and not int8 else store(params["embed" if tied else "lm_head"].T)
    encoder, decoder = stack_of(params["encoder"], encoder_layer), stack_of(params["decoder"], decoder_layer)
    return T5Params(embed, encoder, decoder, head)


def prefill(
    config: T5Config,
    params: T5Params,
    encoder_tokens: Int[Array, "B S"],
    encoder_lengths: Int[Array, " B"],
    *,
    capacity: int,
    dtype: Any = None,
) -> tuple[CrossCache, KVCache]:
    """Encodes the sources and makes an empty cache; the first token to feed is `config.decoder_start_id`.

    Args:
        config: architecture.
        params: decoding layout.
        encoder_tokens: sources, padded on the right.
        encoder_lengths: real tokens of each row.
        capacity: slots of the cache, at least the number of tokens that will be fed.
        dtype: of the cache; None is that of the parameters.
    """
    c, (batch, count) = config, encoder_tokens.shape
    pattern = Pattern(query_lengths=encoder_lengths, key_lengths=encoder_lengths)

    def bias_of(table: Table) -> Array:
        options = {"max_distance": c.relative_max_distance, "bidirectional": True}
        return relative_bias(table, queries=count, keys=count, **options).astype(params.embed.dtype)

    def mix(query: Array, key: Array, value: Array, bias: Array | None) -> Array:
        return attention(query, key, value, pattern=pattern, scale=1.0, bias=bias, implementation=c.attention)

    x = _embed(params, encoder_tokens)
    shared = None if params.encoder.table is None else bias_of(params.encoder.table)
    for i, layer in enumerate(params.encoder.layers):
        own = layer.attention.table
        bias = shared if own is None else bias_of(own)
        with jax.named_scope(f"encoder/layers/{i}"):
            x = _attend_self(c, layer.attention, site(x, "input"), lambda q, k, v, bias=bias: mix(q, k, v, bias))
            x = _mlp(c, layer.mlp, x)
    encoded = _norm(c, x, params.encoder.final_norm)
    keys, values = [], []
    for i, layer in enumerate(params.decoder.layers):
        with jax.named_scope(f"decoder/layers/{i}"):
            key, value = _cross_keys_values(c, layer.cross, encoded)
        keys.append(key)
        values.append(value)
    cache = kv.init_cache(
        batch=batch,
        capacity=capacity,
        num_layers=c.num_decoder_layers,
        num_kv_heads=c.num_heads,
        head_dim=c.head_dim,
        dtype=dtype or params.embed.dtype,
    )
    return CrossCache(tuple(keys), tuple(values), jnp.arange(count)[None] < encoder_lengths[:, None]), cache


def decode_step(
    config: T5Config,
    params: T5Params,
    cross: CrossCache,
    cache: KVCache,
    tokens: Int[Array, " B"],
    positions: Int[Array, " B"],
    *,
    attended: int | None = None,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Appends one token per row, all in the same slot, and returns the logits of the next.

    Args:
        config: architecture.
        params: decoding layout.
        cross: of the same call of `prefill` as the cache.
        cache: from `prefill` or an earlier step.
        tokens: one per row, first `config.decoder_start_id`.
        positions: of those tokens in their rows, from 0.
        attended: read only so many first slots; the caller knows that the rest is empty. None reads all.
    """
    seen = jax.lax.dynamic_update_slice_in_dim(cache.positions, positions[:, None], cache.slot, axis=1)

    def put(store: kv.Store, new: Array) -> kv.Store:
        return kv.write(store, new, cache.slot)

    logits, keys, values = _through_cache(
        config, params, cross, cache, tokens[:, None], positions[:, None], seen[:, :attended], put
    )
    return logits[:, 0], KVCache(keys, values, seen, cache.slot + 1)


def extend(
    config: T5Config,
    params: T5Params,
    cross: CrossCache,
    cache: KVCache,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
) -> tuple[Float[Array, "B T V"], KVCache]:
    """Appends T tokens per row, each in the slot of its own position, and returns the logits after each.

    Rows may advance by different counts: what a later call feeds at a position replaces what was there, and nothing
    sees beyond its own position.
    """
    rows = jnp.arange(tokens.shape[0])[:, None]
    seen = cache.positions.at[rows, positions].set(positions, mode="drop")

    def put(store: kv.Store, new: Array) -> kv.Store:
        return kv.write_at(store, new, positions)

    logits, keys, values = _through_cache(config, params, cross, cache, tokens, positions, seen, put)
    return logits, KVCache(keys, values, seen, cache.slot)


def _through_cache(
    config: T5Config,
    params: T5Params,
    cross: CrossCache,
    cache: KVCache,
    tokens: Array,
    positions: Array,
    seen: Array,
    put: Callable[[kv.Store, Array], kv.Store],
) -> tuple[Array, tuple[Any, ...], tuple[Any, ...]]:
    c, count = config, tokens.shape[1]
    capacity = cache.positions.shape[1]
    visible = kv.visible_slots(seen, positions)
    cross_visible = jnp.broadcast_to(cross.visible[:, None], (*tokens.shape, cross.visible.shape[1]))

    def bias_of(table: Table) -> Array:
        return relative_bias_at(table, positions, seen, max_distance=c.relative_max_distance, capacity=capacity)

    def look(query: Array, keys: Any, values: Any, mask: Array, bias: Array | None) -> Array:
        if count > 1:
            return kv.attend_many(query, keys, values, visible=mask, scale=1.0, bias=bias)
        bias = None if bias is None else bias[:, :, 0]
        return kv.attend(query[:, 0], keys, values, visible=mask[:, 0], scale=1.0, bias=bias)[:, None]

    x, keys, values = _embed(params, tokens), [], []
    shared = None if params.decoder.table is None else bias_of(params.decoder.table)
    for i, layer in enumerate(params.decoder.layers):
        own = layer.attention.table
        bias = shared if own is None else bias_of(own)

        def mix(query: Array, key: Array, value: Array, i: int = i, bias: Array | None = bias) -> Array:
            both = kv.put(put, cache.keys[i], cache.values[i], key, value)
            keys.append(both[0])
            values.append(both[1])
            return look(query, keys[-1], values[-1], visible, bias)

        def mix_cross(query: Array, i: int = i) -> Array:
            return look(query, cross.keys[i], cross.values[i], cross_visible, None)

        with jax.named_scope(f"decoder/layers/{i}"):
            x = _attend_self(c, layer.attention, site(x, "input"), mix)
            x = _attend_cross(c, layer.cross, x, mix_cross)
            x = _mlp(c, layer.mlp, x)
    return _logits(c, params, _norm(c, x, params.decoder.final_norm)), tuple(keys), tuple(values)


def _attend_self(c: T5Config, p: AttentionParams, x: Array, mix: Callable[[Array, Array, Array], Array]) -> Array:
    with jax.named_scope("attention"):
        joined = project(_norm(c, x, p.norm), p.qkv).reshape(*x.shape[:2], 3, c.num_heads, c.head_dim)
        query, key, value = site(joined[:, :, 0], "query"), site(joined[:, :, 1], "key"), site(joined[:, :, 2], "value")
        update = _out(p.out, mix(query, key, value))
    return _add(x, update, "attention")


def _attend_cross(c: T5Config, p: CrossParams, x: Array, mix: Callable[[Array], Array]) -> Array:
    with jax.named_scope("cross_attention"):
        query = project(_norm(c, x, p.norm), p.query).reshape(*x.shape[:2], c.num_heads, c.head_dim)
        update = _out(p.out, mix(site(query, "query")))
    return _add(x, update, "cross_attention")


def _out(out: Matrix, mixed: Array) -> Array:
    mixed = site(mixed, "heads")
    return project(mixed.reshape(*mixed.shape[:2], -1), out)


@jax.named_scope("cross_attention")
def _cross_keys_values(c: T5Config, p: CrossParams, encoded: Array) -> tuple[Array, Array]:
    joined = project(encoded, p.key_value).reshape(*encoded.shape[:2], 2, c.num_heads, c.head_dim)
    key, value = site(joined[:, :, 0], "key"), site(joined[:, :, 1], "value")
    return jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)


def _mlp(c: T5Config, p: MLPParams, x: Array) -> Array:
    activation = ACTIVATIONS[c.activation]
    with jax.named_scope("mlp"):
        h = project(_norm(c, x, p.norm), p.up)
        if c.gated:
            gate, up = jnp.split(h, 2, axis=-1)
            h = activation(site(gate, "gate")) * site(up, "up")
        else:
            h = activation(site(h, "up"))
        update = project(site(h, "neurons"), p.down, dtype=x.dtype)  # the sum that overflows float16, see `T5MLP`
    return _add(x, update, "mlp")


def _add(x: Array, update: Array, name: str) -> Array:
    return site(x + site(update, f"{name}_output").astype(x.dtype), f"after_{name}")


def _norm(c: T5Config, x: Array, weight: Array) -> Array:
    """Normalises the residual stream into the compute dtype, which is the weight's."""
    return rms_norm(x, weight.astype(x.dtype), eps=c.norm_eps).astype(weight.dtype)


def _embed(params: T5Params, tokens: Array) -> Array:
    return params.embed[tokens].astype(stream_dtype(params.embed.dtype))


def _logits(c: T5Config, params: T5Params, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    return project(scale_output(c, x), params.head, dtype=jnp.float32)
