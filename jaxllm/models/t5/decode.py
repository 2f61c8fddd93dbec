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
from jaxllm.models.functions import Pairs
from jaxllm.models.stack import Hold, decode_stack, unstack
from jaxllm.models.t5.layer import (
    CrossParts,
    Parts,
    layer_body,
    own_or_shared,
    scale_output,
    source_keys_values,
    stream_dtype,
    whole_attention,
)
from jaxllm.models.t5.model import T5
from jaxllm.ops.activations import ACTIVATIONS
from jaxllm.ops.masks import Pattern
from jaxllm.ops.matrices import Matrix, Rows, project, stored
from jaxllm.ops.norms import rms_norm
from jaxllm.ops.relative_bias import relative_bias, relative_bias_at

Table = Float[Array, "R N"]


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


class LayerParams(NamedTuple):
    """One layer; `cross` is None in the encoder."""

    attention: AttentionParams
    cross: CrossParams | None
    mlp: MLPParams


class StackParams(NamedTuple):
    """One stack; `table` is the relative bias that its layers share, or None."""

    layers: tuple[LayerParams, ...]
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

    def layer_of(tree: dict[str, Any]) -> LayerParams:
        cross = cross_of(tree) if "cross_attention" in tree else None
        return LayerParams(attention_of(tree), cross, mlp_of(tree))

    def stack_of(tree: dict[str, Any]) -> StackParams:
        layers = tuple(layer_of(layer) for layer in unstack(tree["layers"]))
        return StackParams(layers, cast(tree, "relative_bias"), norm(tree, "final_norm"))

    embed, tied = params["embed"].astype(dtype), "lm_head" not in params
    head = Rows(embed) if tied and not int8 else store(params["embed" if tied else "lm_head"].T)
    return T5Params(embed, stack_of(params["encoder"]), stack_of(params["decoder"]), head)


def prefill(
    model: T5,
    params: T5Params,
    encoder_tokens: Int[Array, "B S"],
    encoder_lengths: Int[Array, " B"],
    *,
    capacity: int,
    dtype: Any = None,
) -> tuple[CrossCache, KVCache]:
    """Encodes the sources and makes an empty cache; the first token to feed is `config.decoder_start_id`.

    Args:
        model: its config, and its own attention and bias where it has them.
        params: decoding layout.
        encoder_tokens: sources, padded on the right.
        encoder_lengths: real tokens of each row.
        capacity: slots of the cache, at least the number of tokens that will be fed.
        dtype: of the cache; None is that of the parameters.
    """
    c, (batch, count) = model.config, encoder_tokens.shape
    encoded = _encode(model, params, encoder_tokens, encoder_lengths)
    keys, values = [], []
    layers = [layer.cross for layer in params.decoder.layers if layer.cross is not None]
    for i, layer in enumerate(layers):
        with jax.named_scope(f"decoder/layers/{i}"):
            key, value = source_keys_values(_cross_parts(c, layer), encoded, rows=batch)
        keys.append(jnp.swapaxes(key, 1, 2))
        values.append(jnp.swapaxes(value, 1, 2))
    cache = kv.init_cache(
        batch=batch,
        capacity=capacity,
        num_layers=c.num_decoder_layers,
        num_kv_heads=c.num_heads,
        head_dim=c.head_dim,
        dtype=dtype or params.embed.dtype,
    )
    return CrossCache(tuple(keys), tuple(values), jnp.arange(count)[None] < encoder_lengths[:, None]), cache


def _encode(model: T5, params: T5Params, tokens: Int[Array, "B S"], lengths: Int[Array, " B"]) -> Array:
    c, count = model.config, tokens.shape[1]
    pattern = Pattern(query_lengths=lengths, key_lengths=lengths)
    attend = whole_attention(c, model.attend, pattern, queries=count, keys=count)

    def build(table: Table) -> Array:
        if model.position_bias is not None:
            positions = jnp.arange(count)[None]
            bias = model.position_bias(table, positions, positions, bidirectional=True)
        else:
            options = {"max_distance": c.relative_max_distance, "bidirectional": True}
            bias = relative_bias(table, queries=count, keys=count, **options)
        return bias.astype(params.embed.dtype)

    bias_of = own_or_shared(build, params.encoder.table)
    x = _embed(params, tokens)
    for i, layer in enumerate(params.encoder.layers):
        with jax.named_scope(f"encoder/layers/{i}"):
            own = functools.partial(attend, bias=bias_of(layer.attention.table), drop=None)
            x = layer_body(_parts(c, layer), x, own)
    return _norm(c, x, params.encoder.final_norm)


def decode_step(
    model: T5,
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
        model: as in `prefill`.
        params: decoding layout.
        cross: of the same call of `prefill` as the cache.
        cache: from `prefill` or an earlier step.
        tokens: one per row, first `config.decoder_start_id`.
        positions: of those tokens in their rows, from 0.
        attended: read only so many first slots; the caller knows that the rest is empty. None reads all.
    """
    update = kv.append(cache, positions)
    pairs = kv.visible_pairs(update.positions[:, :attended], positions[:, None])
    look = kv.attend_by(model.attend, kv.attend_one)
    logits, cache = _through_cache(model, params, cross, cache, tokens[:, None], update, pairs, look)
    return logits[:, 0], cache


def extend(
    model: T5,
    params: T5Params,
    cross: CrossCache,
    cache: KVCache,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
) -> tuple[Float[Array, "B T V"], KVCache]:
    """Appends T tokens per row as `kv.extend` does, and returns the logits after each."""
    update = kv.extend(cache, positions)
    pairs = kv.visible_pairs(update.positions, positions)
    look = kv.attend_by(model.attend, kv.attend_many)
    return _through_cache(model, params, cross, cache, tokens, update, pairs, look)


def _through_cache(
    model: T5,
    params: T5Params,
    cross: CrossCache,
    cache: KVCache,
    tokens: Int[Array, "B T"],
    update: kv.Update,
    pairs: Pairs,
    look: Callable[..., Array],
) -> tuple[Float[Array, "B T V"], KVCache]:
    c, sources = model.config, cross.visible.shape[1]
    source_mask = jnp.broadcast_to(cross.visible[:, None], (*tokens.shape, sources))
    source_pairs = Pairs(source_mask, pairs.query_positions, jnp.arange(sources)[None])

    def build(table: Table) -> Array:
        places = pairs.query_positions, pairs.key_positions
        if model.position_bias is not None:
            return model.position_bias(table, *places, bidirectional=False)
        capacity = cache.positions.shape[1]
        return relative_bias_at(table, *places, max_distance=c.relative_max_distance, capacity=capacity)

    bias_of = own_or_shared(build, params.decoder.table)

    def layer(part: tuple[LayerParams, kv.Store, kv.Store], x: Array, hold: Hold) -> Array:
        own, source_keys, source_values = part
        seen = pairs._replace(bias=bias_of(own.attention.table))

        def attend(query: Array, key: Array, value: Array) -> Array:
            return look(query, *hold(key, value), seen, scale=1.0)

        def attend_source(query: Array) -> Array:
            return look(query, source_keys, source_values, source_pairs, scale=1.0)

        return layer_body(_parts(c, own), x, attend, attend_source)

    layers = list(zip(params.decoder.layers, cross.keys, cross.values, strict=True))
    x, cache = decode_stack(layer, layers, _embed(params, tokens), cache, update, scope="decoder/layers")
    return _logits(c, params, _norm(c, x, params.decoder.final_norm)), cache


def _parts(c: T5Config, layer: LayerParams) -> Parts:
    attention, cross, mlp = layer

    def qkv(h: Array) -> tuple[Array, Array, Array]:
        joined = _heads(c, project(h, attention.qkv), 3)
        return joined[:, :, 0], joined[:, :, 1], joined[:, :, 2]

    def gate_up(h: Array) -> tuple[Array | None, Array]:
        up = project(h, mlp.up)
        if not c.gated:
            return None, up
        gate, up = jnp.split(up, 2, axis=-1)
        return gate, up

    return Parts(
        attn_norm=lambda x: _norm(c, x, attention.norm),
        qkv=qkv,
        out=lambda mixed: project(mixed, attention.out),
        cross=None if cross is None else _cross_parts(c, cross),
        mlp_norm=lambda x: _norm(c, x, mlp.norm),
        gate_up=gate_up,
        activation=ACTIVATIONS[c.activation],
        # The sum that overflows float16, see `T5MLP.down`.
        down=lambda neurons: project(neurons, mlp.down, dtype=stream_dtype(neurons.dtype)),
    )


def _cross_parts(c: T5Config, cross: CrossParams) -> CrossParts:
    def keys_values(source: Array) -> tuple[Array, Array]:
        joined = _heads(c, project(source, cross.key_value), 2)
        return joined[:, :, 0], joined[:, :, 1]

    return CrossParts(
        norm=lambda x: _norm(c, x, cross.norm),
        query=lambda h: project(h, cross.query).reshape(*h.shape[:2], c.num_heads, c.head_dim),
        keys_values=keys_values,
        out=lambda mixed: project(mixed, cross.out),
    )


def _heads(c: T5Config, x: Array, count: int) -> Float[Array, "B T W N H"]:
    return x.reshape(*x.shape[:2], count, c.num_heads, c.head_dim)


def _norm(c: T5Config, x: Array, weight: Array) -> Array:
    """Normalises the residual stream into the compute dtype, which is the weight's."""
    return rms_norm(x, weight.astype(x.dtype), eps=c.norm_eps).astype(weight.dtype)


def _embed(params: T5Params, tokens: Array) -> Array:
    return params.embed[tokens].astype(stream_dtype(params.embed.dtype))


def _logits(c: T5Config, params: T5Params, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    return project(scale_output(c, x), params.head, dtype=jnp.float32)
