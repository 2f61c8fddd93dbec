"""T5's decoding half: sources into an immutable cross cache, then targets one or several tokens at a time.

Pure functions on the decoding layout, as for Llama: one NamedTuple per layer, cast once, projections of one input
joined. Out of scope: training, choosing tokens.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.config import T5Config
from jaxllm.models import cache as kv
from jaxllm.models.cache import CrossCache, KVCache
from jaxllm.models.decoder import Decoder, Plan, check_methods, check_prepared
from jaxllm.models.functions import Pairs
from jaxllm.models.layers import LayerMaps, apply
from jaxllm.models.model import check_params
from jaxllm.models.stack import Hold, decode_stack, embed_and_head, unstack
from jaxllm.models.t5.layer import (
    CrossMaps,
    layer_bias,
    layer_body,
    scale_output,
    source_keys_values,
    stream_dtype,
    whole_attention,
)
from jaxllm.models.t5.model import T5, whole_bias
from jaxllm.ops.masks import Pattern
from jaxllm.ops.pointwise import ACTIVATIONS, rms_norm
from jaxllm.ops.positions import relative_bias_at
from jaxllm.ops.stored import Matrix, project, stored

Table = Float[Array, "R N"]


class CrossParams(NamedTuple):
    """Attention over the encoder's output."""

    norm: Array
    query: Matrix
    key_value: Matrix
    out: Matrix


class LayerParams(NamedTuple):
    """One layer; `table` is its own relative bias (UMT5), `cross` a decoder's; gate and up are joined when gated."""

    attn_norm: Array
    qkv: Matrix
    out: Matrix
    table: Table | None
    cross: Any  # CrossParams, or None in the encoder
    mlp_norm: Array
    up: Matrix
    down: Matrix


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
    """The decoding layout of training parameters, in the compute dtype; `int8` as for Llama."""

    def joined(tree: dict[str, Any], *names: str) -> Matrix:
        kernel = jnp.concatenate([tree[name]["kernel"] for name in names if name in tree], axis=1)
        return stored(kernel, dtype=dtype, int8=int8)

    def table(tree: dict[str, Any]) -> Array | None:
        return tree["relative_bias"].astype(dtype) if "relative_bias" in tree else None

    def norm(tree: dict[str, Any], name: str) -> Array:
        return tree[name]["weight"].astype(dtype)

    def cross_of(tree: dict[str, Any]) -> CrossParams:
        part = tree["cross_attention"]
        query, pair = joined(part, "q_proj"), joined(part, "k_proj", "v_proj")
        return CrossParams(norm(tree, "cross_norm"), query, pair, joined(part, "o_proj"))

    def layer_of(tree: dict[str, Any]) -> LayerParams:
        return LayerParams(
            attn_norm=norm(tree, "attn_norm"),
            qkv=joined(tree["attention"], "q_proj", "k_proj", "v_proj"),
            out=joined(tree["attention"], "o_proj"),
            table=table(tree),
            cross=cross_of(tree) if "cross_attention" in tree else None,
            mlp_norm=norm(tree, "mlp_norm"),
            up=joined(tree["mlp"], "gate_proj", "up_proj"),
            down=joined(tree["mlp"], "down_proj"),
        )

    def stack_of(tree: dict[str, Any]) -> StackParams:
        layers = tuple(layer_of(layer) for layer in unstack(tree["layers"]))
        return StackParams(layers, table(tree), norm(tree, "final_norm"))

    embed, head = embed_and_head(params, dtype=dtype, int8=int8)
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
        model: its config, own attention and own bias are used.
        params: decoding layout.
        encoder_tokens: sources, padded on the right.
        encoder_lengths: real tokens of each row.
        capacity: slots of the cache, at least the number of tokens that will be fed.
        dtype: of the cache; None is that of the parameters.
    """
    c, (batch, count) = model.config, encoder_tokens.shape
    encoded = _encode(model, params, encoder_tokens, encoder_lengths)
    keys, values = [], []
    for i, layer in enumerate(params.decoder.layers):
        with jax.named_scope(f"decoder/layers/{i}"):
            key, value = source_keys_values(_cross_maps(c, layer.cross), encoded, rows=batch)
        keys.append(jnp.swapaxes(key, 1, 2))
        values.append(jnp.swapaxes(value, 1, 2))
    sizes = {"num_layers": c.num_decoder_layers, "num_kv_heads": c.num_heads, "head_dim": c.head_dim}
    cache = kv.init_cache(batch=batch, capacity=capacity, dtype=dtype or params.embed.dtype, **sizes)
    return CrossCache(tuple(keys), tuple(values), jnp.arange(count)[None] < encoder_lengths[:, None]), cache


def _encode(model: T5, params: T5Params, tokens: Int[Array, "B S"], lengths: Int[Array, " B"]) -> Array:
    c, count = model.config, tokens.shape[1]
    pattern = Pattern(query_lengths=lengths, key_lengths=lengths)
    attend = whole_attention(c, model.attend, pattern, queries=count, keys=count)

    def build(table: Table) -> Array:
        return whole_bias(c, model.position_bias, table, count, bidirectional=True).astype(params.embed.dtype)

    bias_of = layer_bias(build, params.encoder.table)
    x = _embed(params, tokens)
    for i, layer in enumerate(params.encoder.layers):
        with jax.named_scope(f"encoder/layers/{i}"):
            attend_biased = functools.partial(attend, bias=bias_of(layer.table), drop=None)
            x = layer_body(_maps(c, layer), x, attend_biased)
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
    """Appends one token per row, at `positions` from 0 but all in the same slot; returns the logits of the next.

    It reads the first `attended` slots, or all; the others must be empty. `cross` and the first cache are from the
    same call of `prefill`.
    """
    turn = kv.append(cache, positions, model.attend, attended=attended)
    logits, cache = through_cache(model, params, cross, cache, tokens[:, None], turn)
    return logits[:, 0], cache


def through_cache(
    model: T5, params: T5Params, cross: CrossCache, cache: KVCache, tokens: Int[Array, "B T"], turn: kv.Turn
) -> tuple[Float[Array, "B T V"], KVCache]:
    """Appends T tokens per row in the slots of `turn`; the logits after each, and the cache."""
    c, sources = model.config, cross.visible.shape[1]
    places = turn.pairs.query_positions, turn.pairs.key_positions
    source_mask = jnp.broadcast_to(cross.visible[:, None], (*tokens.shape, sources))
    source_pairs = Pairs(source_mask, places[0], jnp.arange(sources)[None])

    def build(table: Table) -> Array:
        if model.position_bias is not None:
            return model.position_bias(table, *places, bidirectional=False)
        capacity = cache.positions.shape[1]
        return relative_bias_at(table, *places, max_distance=c.relative_max_distance, capacity=capacity)

    bias_of = layer_bias(build, params.decoder.table)

    def layer(part: tuple[LayerParams, kv.Store, kv.Store], x: Array, hold: Hold) -> Array:
        weights, *source = part
        pairs = turn.pairs._replace(bias=bias_of(weights.table))

        def attend(query: Array, key: Array, value: Array) -> Array:
            return turn.attend(query, *hold(key, value), pairs, scale=1.0)

        def attend_source(query: Array) -> Array:
            return turn.attend(query, *source, source_pairs, scale=1.0)

        return layer_body(_maps(c, weights), x, attend, (_cross_maps(c, weights.cross), attend_source))

    layers = list(zip(params.decoder.layers, cross.keys, cross.values, strict=True))
    x, cache = decode_stack(layer, layers, _embed(params, tokens), cache, turn.update, scope="decoder/layers")
    x = scale_output(c, _norm(c, x, params.decoder.final_norm))
    return project(x, params.head, dtype=jnp.float32), cache


def _maps(c: T5Config, layer: LayerParams) -> LayerMaps:
    def qkv(h: Array) -> tuple[Array, Array, Array]:
        joined = _heads(c, project(h, layer.qkv), 3)
        return joined[:, :, 0], joined[:, :, 1], joined[:, :, 2]

    def gate_up(h: Array) -> tuple[Array | None, Array]:
        up = project(h, layer.up)
        if not c.gated:
            return None, up
        gate, up = jnp.split(up, 2, axis=-1)
        return gate, up

    return LayerMaps(
        attn_norm=lambda x: _norm(c, x, layer.attn_norm),
        qkv=qkv,
        out=lambda mixed: project(mixed, layer.out),
        mlp_norm=lambda x: _norm(c, x, layer.mlp_norm),
        gate_up=gate_up,
        activation=ACTIVATIONS[c.activation],
        # The sum that overflows float16, see `T5MLP.down`.
        down=lambda neurons: project(neurons, layer.down, dtype=stream_dtype(neurons.dtype)),
    )


def _cross_maps(c: T5Config, cross: CrossParams) -> CrossMaps:
    def keys_values(source: Array) -> tuple[Array, Array]:
        joined = _heads(c, project(source, cross.key_value), 2)
        return joined[:, :, 0], joined[:, :, 1]

    return CrossMaps(
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


class T5Decoder(Decoder):
    """T5's side of the decoding loops: an encoder-decoder answers its prompt, from the decoder's start token on."""

    def prepare(self, params: Any, *, int8: bool = False) -> T5Params:
        """See `Decoder`."""
        check_methods(type(self.model), T5)
        if isinstance(params, T5Params):
            encoder = (len(params.encoder.layers), self.model.config.num_layers)
            decoder = (len(params.decoder.layers), self.model.config.num_decoder_layers)
            check_prepared(self.model, params.embed, encoder=encoder, decoder=decoder)
            return params
        check_params(self.model, params)
        return prepare_for_decode(params, dtype=self.model.dtype, int8=int8)

    def plan(self, *, prompt: int, new: int, needed: int, cache_dtype: str | None, wraps: bool) -> Plan:
        """See `Decoder`: only the start token precedes the new ones in the cache."""
        return Plan(prompt, new, 1, 1 + new, None, cache_dtype)

    def start(self, params: Any, tokens: Array, lengths: Array, plan: Plan) -> tuple[Any, Array, KVCache, Array]:
        """See `Decoder`."""
        cross, cache = prefill(self.model, params, tokens, lengths, capacity=plan.slots, dtype=plan.cache_dtype)
        zeros = jnp.zeros_like(lengths)
        start = zeros + self.model.config.decoder_start_id
        logits, cache = decode_step(self.model, params, cross, cache, start, zeros, attended=1)
        return cross, logits, cache, zeros + 1

    def step(
        self, params: Any, context: Any, cache: KVCache, tokens: Array, positions: Array, plan: Plan, attended: int
    ) -> tuple[Array, KVCache]:
        """See `Decoder`."""
        return decode_step(self.model, params, context, cache, tokens, positions, attended=attended)

    def history(self, tokens: Array, lengths: Array) -> tuple[Array, Array]:
        """See `Decoder`: the start token, not the encoder's input."""
        begun = jnp.full((tokens.shape[0], 1), self.model.config.decoder_start_id, jnp.int32)
        return begun, jnp.ones(begun.shape, bool)

    def full_logits(
        self, params: Any, tokens: Array, lengths: Array, new: Array, *, length: int | None = None
    ) -> Float[Array, "B N V"]:
        """See `Decoder`."""
        begun = jnp.full((tokens.shape[0], 1), self.model.config.decoder_start_id, new.dtype)
        shifted = jnp.concatenate([begun, new[:, :-1]], axis=1)
        return apply(self.model, params, tokens, shifted, encoder_lengths=lengths)
