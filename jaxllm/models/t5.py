"""T5 (arXiv 1910.10683) and its relatives v1.1, Flan, mT5, UMT5, ByT5, UL2: an encoder-decoder with relative positions.

Pure entry points on one parameter tree: `__call__` and `hidden` for training and scoring, `encode` and `decode` for
its halves, none of which takes a cache; `prefill` and `decode_step` for generation (`KVCache` in, `KVCache` out, the
encoder as an immutable `CrossCache`, parameters from `prepare_for_decode`). No score scale: T5 puts it into q's initial
size. Not here: objectives, Hugging Face names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.config import T5Config
from jaxllm.models import cache as kv
from jaxllm.models.cache import CrossCache, KVCache
from jaxllm.models.layers import (
    ACTIVATIONS,
    Linear,
    Params,
    RMSNorm,
    apply,
    apply_stack,
    embed,
    init_stack,
    layer_list,
    saved,
    unstack,
)
from jaxllm.ops.attention import Pattern, attention
from jaxllm.ops.dropout import dropout, split_keys
from jaxllm.ops.linear import linear_float32
from jaxllm.ops.relative_bias import relative_bias, relative_bias_row

# Gives a layer its bias, from its own table where it has one (UMT5) or else the one that its stack shares.
BiasOf = Callable[[Array | None], Array | None]


def stream_dtype(dtype: Any) -> Any:
    """Dtype of the residual stream: T5's outgrows float16, whose largest number is 65504."""
    return jnp.float32 if dtype == jnp.float16 else dtype


class T5Attention(nn.Module):
    """Attention of x over a source, which is x itself or the encoder's output."""

    config: T5Config

    def setup(self) -> None:
        """Creates the four projections."""
        c = self.config
        inner, std = c.num_heads * c.head_dim, c.init_factor * c.d_model**-0.5
        self.q_proj = Linear(c.d_model, inner, std * c.head_dim**-0.5)
        self.k_proj = Linear(c.d_model, inner, std)
        self.v_proj = Linear(c.d_model, inner, std)
        self.o_proj = Linear(inner, c.d_model, c.init_factor * inner**-0.5)

    def __call__(
        self, x: Float[Array, "B T D"], source: Float[Array, "B S D"], pattern: Pattern, bias: Any, key: Array | None
    ) -> Float[Array, "B T D"]:
        """Attention over whole sequences; `key` is for dropout on its weights."""
        c = self.config
        drop = functools.partial(dropout, key=key, rate=c.dropout_rate) if key is not None and c.dropout_rate else None
        keys, values = self.keys_values(source)
        mixed = attention(
            saved(self._heads(self.q_proj(x)), "query"),
            saved(keys, "key"),
            saved(values, "value"),
            pattern=pattern,
            scale=1.0,
            bias=bias,
            implementation=c.attention,
            drop=drop,
        )
        return self.o_proj(saved(mixed, "attention").reshape(*x.shape[:2], -1))

    def keys_values(self, source: Float[Array, "B S D"]) -> tuple[Float[Array, "B S N H"], Float[Array, "B S N H"]]:
        """What the source offers to queries."""
        return self._heads(self.k_proj(source)), self._heads(self.v_proj(source))

    def attend(
        self, x: Float[Array, "B 1 D"], keys: Array, values: Array, visible: Array, bias: Array | None
    ) -> Float[Array, "B 1 D"]:
        """Attention of one token per row over stored keys and values."""
        query = self._heads(self.q_proj(x))[:, 0]
        mixed = kv.attend(query, keys, values, visible=visible, scale=1.0, bias=bias)
        return self.o_proj(mixed.reshape(*x.shape[:2], -1))

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], self.config.num_heads, self.config.head_dim)


class T5MLP(nn.Module):
    """down(act(gate x) * up x), or down(act(up x)) when not gated."""

    config: T5Config

    def setup(self) -> None:
        """Creates two or three projections."""
        c = self.config
        std = c.init_factor * c.d_model**-0.5
        if c.gated:
            self.gate_proj = Linear(c.d_model, c.d_ff, std)
        self.up_proj = Linear(c.d_model, c.d_ff, std)
        self.down_proj = Linear(c.d_ff, c.d_model, c.init_factor * c.d_ff**-0.5)

    def __call__(self, x: Float[Array, "B T D"], key: Array | None) -> Float[Array, "B T D"]:
        """Maps each position by itself; float16 in, float32 out, because this sum is what overflows in T5."""
        c = self.config
        activation, up = ACTIVATIONS[c.activation], saved(self.up_proj(x), "up")
        h = activation(saved(self.gate_proj(x), "gate")) * up if c.gated else activation(up)
        h = dropout(h, key, rate=c.dropout_rate)
        if h.dtype == jnp.float16:
            return linear_float32(h, self.down_proj.kernel.astype(h.dtype))
        return self.down_proj(h)


class EncoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Attributes:
        config: architecture.
        dtype: of the sublayers; the stream keeps its own (`stream_dtype`).
    """

    config: T5Config
    dtype: Any

    def setup(self) -> None:
        """Creates the sublayers, their norms, and the bias table where each layer has its own."""
        c = self.config
        self.attn_norm = RMSNorm(c.d_model, c.norm_eps)
        self.attention = T5Attention(c)
        self.mlp_norm = RMSNorm(c.d_model, c.norm_eps)
        self.mlp = T5MLP(c)
        self.relative_bias = _create_table(self) if c.relative_per_layer else None

    def __call__(
        self, x: Float[Array, "B S D"], pattern: Pattern, bias_of: BiasOf, key: Array | None
    ) -> Float[Array, "B S D"]:
        """One layer over whole sequences."""
        weights_key, attention_key, inner_key, mlp_key = split_keys(key, 4)
        h = self.attn_norm(x).astype(self.dtype)
        bias = bias_of(self.relative_bias)
        x = _add(self.config, x, self.attention(h, h, pattern, bias, weights_key), attention_key)
        h = self.mlp_norm(x).astype(self.dtype)
        return _add(self.config, x, self.mlp(h, inner_key), mlp_key)


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + cross_attention(norm(x), encoded), then x + mlp(norm(x)).

    Attributes:
        config: architecture.
        dtype: of the sublayers; the stream keeps its own (`stream_dtype`).
    """

    config: T5Config
    dtype: Any

    def setup(self) -> None:
        """Creates the sublayers, their norms, and the bias table where each layer has its own."""
        c = self.config
        self.attn_norm = RMSNorm(c.d_model, c.norm_eps)
        self.attention = T5Attention(c)
        self.cross_norm = RMSNorm(c.d_model, c.norm_eps)
        self.cross_attention = T5Attention(c)
        self.mlp_norm = RMSNorm(c.d_model, c.norm_eps)
        self.mlp = T5MLP(c)
        self.relative_bias = _create_table(self) if c.relative_per_layer else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        encoded: Float[Array, "B S D"],
        pattern: Pattern,
        cross_pattern: Pattern,
        bias_of: BiasOf,
        key: Array | None,
    ) -> Float[Array, "B T D"]:
        """One layer over whole sequences."""
        c = self.config
        weights_key, attention_key, cross_weights_key, cross_key, inner_key, mlp_key = split_keys(key, 6)
        h = self.attn_norm(x).astype(self.dtype)
        bias = bias_of(self.relative_bias)
        x = _add(c, x, self.attention(h, h, pattern, bias, weights_key), attention_key)
        h = self.cross_norm(x).astype(self.dtype)
        x = _add(c, x, self.cross_attention(h, encoded, cross_pattern, None, cross_weights_key), cross_key)
        h = self.mlp_norm(x).astype(self.dtype)
        return _add(c, x, self.mlp(h, inner_key), mlp_key)

    def cross_keys_values(self, encoded: Float[Array, "B S D"]) -> tuple[Array, Array]:
        """Keys and values of the encoder's output, head-major as `CrossCache` holds them."""
        keys, values = self.cross_attention.keys_values(encoded)
        return jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2)

    def decode(
        self,
        x: Float[Array, "B 1 D"],
        store: tuple[Array, Array],
        slot: Array,
        visible: Array,
        bias_of: BiasOf,
        cross: tuple[Array, Array],
        cross_visible: Array,
    ) -> tuple[Array, Array, Array]:
        """One layer for one new token per row; returns the stream and the updated stores."""
        c = self.config
        h = self.attn_norm(x).astype(self.dtype)
        key, value = self.attention.keys_values(h)
        keys, values = kv.write(store[0], key, slot), kv.write(store[1], value, slot)
        x = _add(c, x, self.attention.attend(h, keys, values, visible, bias_of(self.relative_bias)), None)
        h = self.cross_norm(x).astype(self.dtype)
        x = _add(c, x, self.cross_attention.attend(h, *cross, cross_visible, None), None)
        h = self.mlp_norm(x).astype(self.dtype)
        return _add(c, x, self.mlp(h, None), None), keys, values


def _add(c: T5Config, x: Array, update: Array, key: Array | None) -> Array:
    return saved(x + dropout(update, key, rate=c.dropout_rate).astype(x.dtype), "residual")


def _create_table(module: nn.Module) -> Array:
    c: T5Config = module.config
    std = c.init_factor * c.d_model**-0.5
    return module.param("relative_bias", nn.initializers.normal(std), (c.relative_buckets, c.num_heads))


class _Stack(nn.Module):
    """What encoder and decoder share: stacked layers, one bias table for all of them, and a last norm."""

    config: T5Config
    dtype: Any

    def _create(self) -> None:
        c = self.config
        # Not by self.param alone: it would refuse the per-layer layout of decoding, and trace the initialiser again.
        if not self.has_variable("params", "layers"):
            self.param("layers", init_stack, self._init_layer, self._num_layers())
        self.relative_bias = None if c.relative_per_layer else _create_table(self)
        self.final_norm = RMSNorm(c.d_model, c.norm_eps)

    def _num_layers(self) -> int:
        raise NotImplementedError

    def _init_layer(self, key: Array) -> Params:
        raise NotImplementedError

    def _run(self, layer: Callable[[Params, Array, Array | None], Array], x: Array, key: Array | None) -> Array:
        """Dropout, the layers, the last norm, dropout; from the stream's dtype to the compute dtype."""
        c = self.config
        embed_key, layers_key, last_key = split_keys(key, 3)
        layers = self.get_variable("params", "layers")
        keys = None if layers_key is None else jax.random.split(layers_key, self._num_layers())
        x = dropout(x, embed_key, rate=c.dropout_rate)
        x = apply_stack(layer, layers, x, keys, mode=c.layers, remat=c.remat)
        return dropout(self.final_norm(x).astype(self.dtype), last_key, rate=c.dropout_rate)

    def _bias_of(self, length: int, *, bidirectional: bool) -> BiasOf:
        c = self.config

        def build(table: Array) -> Array:
            bias = relative_bias(
                table,
                queries=length,
                keys=length,
                max_distance=c.relative_max_distance,
                bidirectional=bidirectional,
            )
            return bias.astype(self.dtype)

        return _own_or_shared(build, self.relative_bias)


def _own_or_shared(build: Callable[[Array], Array], table: Array | None) -> BiasOf:
    if table is None:
        return lambda own: None if own is None else build(own)
    shared = build(table)
    return lambda _: shared


class Encoder(_Stack):
    """Layers that see the whole source."""

    def setup(self) -> None:
        """Creates the layers, the shared bias table and the last norm."""
        self._create()

    def __call__(self, x: Float[Array, "B S D"], pattern: Pattern, key: Array | None) -> Float[Array, "B S D"]:
        """Embedded tokens to the output that decoders attend to."""
        layer = EncoderLayer(self.config, self.dtype, parent=None)
        bias_of = self._bias_of(x.shape[1], bidirectional=True)
        return self._run(lambda params, h, own_key: apply(layer, params, h, pattern, bias_of, own_key), x, key)

    def _num_layers(self) -> int:
        return self.config.num_layers

    def _init_layer(self, key: Array) -> Params:
        x = jnp.zeros((1, 1, self.config.d_model), self.dtype)
        layer = EncoderLayer(self.config, self.dtype, parent=None)
        variables: Any = layer.init(key, x, Pattern(), lambda _: None, None)
        return variables["params"]


class Decoder(_Stack):
    """Layers that see the past, and the encoder's output."""

    def setup(self) -> None:
        """Creates the layers, the shared bias table and the last norm."""
        self._create()

    def __call__(
        self,
        x: Float[Array, "B T D"],
        encoded: Float[Array, "B S D"],
        pattern: Pattern,
        cross_pattern: Pattern,
        key: Array | None,
    ) -> Float[Array, "B T D"]:
        """Embedded tokens to the normalised last hidden state."""
        layer = DecoderLayer(self.config, self.dtype, parent=None)
        bias_of = self._bias_of(x.shape[1], bidirectional=False)

        def run(params: Params, h: Array, own_key: Array | None) -> Array:
            return apply(layer, params, h, encoded, pattern, cross_pattern, bias_of, own_key)

        return self._run(run, x, key)

    def cross_keys_values(self, encoded: Float[Array, "B S D"]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Keys and values [B, N, S, H] of every layer's cross-attention."""
        layer = DecoderLayer(self.config, self.dtype, parent=None)
        pairs = [
            apply(layer, params, encoded, method="cross_keys_values")
            for params in layer_list(self.get_variable("params", "layers"))
        ]
        return tuple(keys for keys, _ in pairs), tuple(values for _, values in pairs)

    def decode(
        self, x: Float[Array, "B 1 D"], cross: CrossCache, cache: KVCache, positions: Int[Array, " B"]
    ) -> tuple[Float[Array, "B 1 D"], KVCache]:
        """One new token per row."""
        c = self.config
        seen = jax.lax.dynamic_update_slice_in_dim(cache.positions, positions[:, None], cache.slot, axis=1)
        visible = kv.visible_slots(seen, positions)
        capacity = seen.shape[1]
        bias_of = _own_or_shared(
            lambda table: relative_bias_row(
                table, positions, seen, max_distance=c.relative_max_distance, capacity=capacity
            ),
            self.relative_bias,
        )
        layer = DecoderLayer(c, self.dtype, parent=None)
        stores = list(zip(cache.keys, cache.values, strict=True))
        crosses = zip(cross.keys, cross.values, strict=True)
        for i, (params, source) in enumerate(
            zip(layer_list(self.get_variable("params", "layers")), crosses, strict=True)
        ):
            x, *stores[i] = apply(
                layer, params, x, stores[i], cache.slot, visible, bias_of, source, cross.visible, method="decode"
            )
        keys, values = zip(*stores, strict=True)
        return self.final_norm(x).astype(self.dtype), KVCache(keys, values, seen, cache.slot + 1)

    def _num_layers(self) -> int:
        return self.config.num_decoder_layers

    def _init_layer(self, key: Array) -> Params:
        x = jnp.zeros((1, 1, self.config.d_model), self.dtype)
        layer = DecoderLayer(self.config, self.dtype, parent=None)
        variables: Any = layer.init(key, x, x, Pattern(), Pattern(), lambda _: None, None)
        return variables["params"]


class T5(nn.Module):
    """The encoder-decoder; `dtype` is the compute dtype, parameters are created in float32.

    Attributes:
        config: architecture.
        dtype: of activations and matmul inputs; logits are float32.
    """

    config: T5Config
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Creates the embedding that both stacks share, the stacks, and the head."""
        c = self.config
        self.embed = self.param("embed", nn.initializers.normal(c.init_factor), (c.vocab_size, c.d_model))
        self.encoder = Encoder(c, self.dtype)
        self.decoder = Decoder(c, self.dtype)
        if not c.tie_embeddings:
            # transformers' 1.0 would start at a loss of hundreds of nats; T5X's fan-in is what the tied head amounts to.
            head = nn.initializers.normal(c.init_factor * c.d_model**-0.5)
            self.lm_head = self.param("lm_head", head, (c.vocab_size, c.d_model))

    def __call__(
        self,
        encoder_tokens: Int[Array, "B S"],
        decoder_tokens: Int[Array, "B T"],
        *,
        encoder_segment_ids: Int[Array, "B S"] | None = None,
        decoder_segment_ids: Int[Array, "B T"] | None = None,
        key: Array | None = None,
    ) -> Float[Array, "B T V"]:
        """Float32 logits of the target after each decoder token.

        Args:
            encoder_tokens: source ids.
            decoder_tokens: targets shifted right, each document starting with `config.decoder_start_id`.
            encoder_segment_ids: document of each source token, 0 = padding; None is one document, number 1.
            decoder_segment_ids: document of each decoder token, which sees the source of the same number.
            key: of dropout; None is no dropout.
        """
        segments = {"encoder_segment_ids": encoder_segment_ids, "decoder_segment_ids": decoder_segment_ids}
        return self.logits(self.hidden(encoder_tokens, decoder_tokens, **segments, key=key))

    def hidden(
        self,
        encoder_tokens: Int[Array, "B S"],
        decoder_tokens: Int[Array, "B T"],
        *,
        encoder_segment_ids: Int[Array, "B S"] | None = None,
        decoder_segment_ids: Int[Array, "B T"] | None = None,
        key: Array | None = None,
    ) -> Float[Array, "B T D"]:
        """What the head multiplies, for losses that never build all logits; arguments as `__call__`."""
        encoder_key, decoder_key = split_keys(key, 2)
        encoded = self.encode(encoder_tokens, encoder_segment_ids=encoder_segment_ids, key=encoder_key)
        return self.decode(
            decoder_tokens,
            encoded,
            encoder_segment_ids=encoder_segment_ids,
            decoder_segment_ids=decoder_segment_ids,
            key=decoder_key,
        )

    def encode(
        self,
        encoder_tokens: Int[Array, "B S"],
        *,
        encoder_segment_ids: Int[Array, "B S"] | None = None,
        key: Array | None = None,
    ) -> Float[Array, "B S D"]:
        """The encoder's output; at padding it means nothing."""
        pattern = Pattern(query_segments=encoder_segment_ids, key_segments=encoder_segment_ids)
        return self.encoder(self._embed(encoder_tokens), pattern, key)

    def decode(
        self,
        decoder_tokens: Int[Array, "B T"],
        encoded: Float[Array, "B S D"],
        *,
        encoder_segment_ids: Int[Array, "B S"] | None = None,
        decoder_segment_ids: Int[Array, "B T"] | None = None,
        key: Array | None = None,
    ) -> Float[Array, "B T D"]:
        """The decoder's hidden state over an encoder's output, as `hidden` returns it."""
        c = self.config
        pattern = Pattern(causal=True, query_segments=decoder_segment_ids, key_segments=decoder_segment_ids)
        cross_pattern = Pattern()
        if encoder_segment_ids is not None or decoder_segment_ids is not None:
            ones = functools.partial(jnp.ones, dtype=jnp.int32)
            cross_pattern = Pattern(
                query_segments=ones(decoder_tokens.shape) if decoder_segment_ids is None else decoder_segment_ids,
                key_segments=ones(encoded.shape[:2]) if encoder_segment_ids is None else encoder_segment_ids,
            )
        x = self.decoder(self._embed(decoder_tokens), encoded, pattern, cross_pattern, key)
        return x * jnp.asarray(c.d_model**-0.5, x.dtype) if c.scale_logits else x

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """X @ head.T, accumulated and returned in float32."""
        return jnp.einsum("btd,vd->btv", x, self.head(), preferred_element_type=jnp.float32)

    def head(self) -> Float[Array, "V D"]:
        """The output head in the compute dtype: its own, or the embedding when tied."""
        return (self.embed if self.config.tie_embeddings else self.lm_head).astype(self.dtype)

    def prefill(
        self, encoder_tokens: Int[Array, "B S"], encoder_lengths: Int[Array, " B"], *, capacity: int
    ) -> tuple[CrossCache, KVCache]:
        """Encodes the sources and makes an empty cache; the first `decode_step` feeds `config.decoder_start_id`.

        Args:
            encoder_tokens: sources, padded on the right.
            encoder_lengths: real tokens of each row.
            capacity: slots of the cache, at least the number of new tokens.
        """
        c = self.config
        visible = jnp.arange(encoder_tokens.shape[1])[None] < encoder_lengths[:, None]
        pattern = Pattern(query_lengths=encoder_lengths, key_lengths=encoder_lengths)
        encoded = self.encoder(self._embed(encoder_tokens), pattern, None)
        keys, values = self.decoder.cross_keys_values(encoded)
        empty = kv.init_cache(
            batch=encoder_tokens.shape[0],
            capacity=capacity,
            num_layers=c.num_decoder_layers,
            num_kv_heads=c.num_heads,
            head_dim=c.head_dim,
            dtype=self.dtype,
        )
        return CrossCache(keys, values, visible), empty

    def decode_step(
        self, cross: CrossCache, cache: KVCache, tokens: Int[Array, " B"], positions: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Appends one token per row, at its position in the row's output, and returns the logits of the next."""
        x, cache = self.decoder.decode(self._embed(tokens[:, None]), cross, cache, positions)
        if self.config.scale_logits:
            x = x * jnp.asarray(self.config.d_model**-0.5, x.dtype)
        return self.logits(x)[:, 0], cache

    def _embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return embed(self.embed, tokens, dtype=self.dtype).astype(stream_dtype(self.dtype))


def prepare_for_decode(params: Params, *, dtype: Any) -> Params:
    """The decoding layout: one tree per layer instead of stacks, cast once to the compute dtype."""
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    stacks = {name: {**cast[name], "layers": tuple(unstack(cast[name]["layers"]))} for name in ("encoder", "decoder")}
    return {**cast, **stacks}
