"""T5 (arXiv 1910.10683) and its relatives v1.1, Flan, mT5, UMT5, ByT5, UL2: an encoder-decoder with relative positions.

`__call__` and `hidden` are for training and scoring, `encode` and `decode` for the halves; `Documents` are what they
take about the rows of a batch. None takes a cache; decoding is `jaxllm.models.t5.decode`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.config import T5Config
from jaxllm.models.functions import Attend, PositionBias
from jaxllm.models.layers import DEFAULT_ISLANDS, MASTER, Islands, Params, RMSNorm, apply, embed
from jaxllm.models.model import FamilyModule, Flops, check_shape, check_tokens, refuse
from jaxllm.models.stack import apply_stack, create_stack
from jaxllm.models.t5.layer import (
    BiasOf,
    DecoderLayer,
    EncoderLayer,
    create_table,
    layer_bias,
    scale_output,
    stream_dtype,
    whole_attention,
)
from jaxllm.ops.masks import Pattern
from jaxllm.ops.pointwise import dropout, split_keys
from jaxllm.ops.positions import relative_bias


class Documents(NamedTuple):
    """The documents in the rows of a batch; with no field set, a row is one document without padding."""

    # document of each source token, 0 = padding; None is one document, number 1
    encoder_segment_ids: Int[Array, "#B S"] | None = None
    # document of each decoder token, which sees the source of the same number
    decoder_segment_ids: Int[Array, "B T"] | None = None
    # real source tokens of each row, where a row is one document and padding ends it. They replace segment ids and are
    # faster on a GPU, whose fused attention supports lengths but not documents
    encoder_lengths: Int[Array, "#B"] | None = None

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> "Documents":
        """Those of a training batch, from the fields that it has."""
        return cls(**{name: batch[name] for name in cls._fields if name in batch})

    def encoder(self, rows: int, length: int) -> Pattern:
        """The encoder's attention over itself."""
        check_shape(self.encoder_segment_ids, "encoder_segment_ids", (rows, length))
        segments = self.encoder_segment_ids
        return Pattern(query_segments=segments, key_segments=segments, **self._lengths(rows, rows))

    def decoder(self, rows: int, length: int) -> Pattern:
        """The decoder's attention over itself."""
        check_shape(self.decoder_segment_ids, "decoder_segment_ids", (rows, length))
        return Pattern(causal=True, query_segments=self.decoder_segment_ids, key_segments=self.decoder_segment_ids)

    def cross(self, targets: tuple[int, ...], sources: tuple[int, ...]) -> Pattern:
        """The decoder's attention over the encoder's output: one source for all rows, or one for each."""
        check_shape(self.encoder_segment_ids, "encoder_segment_ids", sources)
        lengths = self._lengths(sources[0], targets[0])
        if self.encoder_segment_ids is None and self.decoder_segment_ids is None:
            return Pattern(**lengths)
        return Pattern(
            query_segments=_or_ones(self.decoder_segment_ids, targets),
            key_segments=_or_ones(self.encoder_segment_ids, sources),
        )

    def _lengths(self, sources: int, rows: int) -> dict[str, Any]:
        """Real keys of each row, at least one: the output of an empty row has no meaning."""
        lengths = self.encoder_lengths
        if lengths is None:
            return {}
        if self.encoder_segment_ids is not None or self.decoder_segment_ids is not None:
            raise ValueError("encoder_lengths make each row one document: give them or segment ids, not both")
        check_shape(lengths, "encoder_lengths", (sources,))
        if not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise ValueError(f"encoder_lengths must be integers, got {lengths.dtype}")
        return {"key_lengths": jnp.broadcast_to(jnp.maximum(lengths, 1).astype(jnp.int32), (rows,)), "some_keys": True}


ONE_A_ROW = Documents()


def _or_ones(segments: Array | None, shape: tuple[int, ...]) -> Array:
    return jnp.ones(shape, jnp.int32) if segments is None else segments


class Stack(nn.Module):
    """Stacked layers, one bias table for all of them, and a last norm."""

    config: T5Config
    dtype: Any
    islands: Islands
    attend: Attend | None
    position_bias: PositionBias | None
    is_decoder: bool  # whether the layers see the past and the encoder's output, or the whole source

    def setup(self) -> None:
        """Creates the layers, the bias table that they share and the last norm."""
        c, layer = self.config, self._layer()

        def init_layer(key: Array) -> Params:
            x = jnp.zeros((1, 1, c.d_model), self.dtype)
            cross = (x, _first) if self.is_decoder else ()
            variables: Any = layer.init(key, x, _first, lambda _: None, None, *cross)
            return variables["params"]

        create_stack(self, init_layer, c.num_decoder_layers if self.is_decoder else c.num_layers)
        if c.relative_per_layer:
            refuse(self, "relative_bias")
        self.relative_bias = None if c.relative_per_layer else create_table(self, c)
        self.final_norm = RMSNorm(c.d_model, c.norm_eps, self.islands.norms)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        pattern: Pattern,
        key: Array | None,
        encoded: Float[Array, "#B S D"] | None = None,
        cross_pattern: Pattern | None = None,
    ) -> Float[Array, "B T D"]:
        """Dropout, the layers, the last norm, dropout; from the residual stream's dtype to the compute dtype."""
        c, layer, length, cross = self.config, self._layer(), x.shape[1], ()
        attend = self._attention(pattern, length, length)
        if encoded is not None and cross_pattern is not None:
            cross = encoded, self._attention(cross_pattern, length, encoded.shape[1])
        bias_of = self._bias_of(length)
        embed_key, layers_key, last_key = split_keys(key if c.dropout_rate else None, 3)
        layers = self.get_variable("params", "layers")
        keys = None if layers_key is None else jax.random.split(layers_key, jax.tree.leaves(layers)[0].shape[0])

        def run(params: Params, h: Array, layer_key: Array | None) -> Array:
            return apply(layer, params, h, attend, bias_of, layer_key, *cross)

        x = dropout(x, embed_key, rate=c.dropout_rate)
        x = apply_stack(run, layers, x, keys, mode=c.layers, remat=c.remat)
        return dropout(self.final_norm(x).astype(self.dtype), last_key, rate=c.dropout_rate)

    def _layer(self) -> nn.Module:
        layer_class = DecoderLayer if self.is_decoder else EncoderLayer
        return layer_class(self.config, self.dtype, self.islands, parent=None)

    def _attention(self, pattern: Pattern, queries: int, keys: int) -> Callable[..., Array]:
        options = {"queries": queries, "keys": keys, "softmax_dtype": self.islands.softmax}
        return whole_attention(self.config, self.attend, pattern, **options)

    def _bias_of(self, length: int) -> BiasOf:
        @jax.named_scope("relative_bias")  # the precision ledger reads it
        def build(table: Array) -> Array:
            options = {"bidirectional": not self.is_decoder, "dtype": self.islands.relative_bias}
            return whole_bias(self.config, self.position_bias, table, length, **options).astype(self.dtype)

        return layer_bias(build, self.relative_bias)


def whole_bias(
    c: T5Config, custom: PositionBias | None, table: Array, length: int, *, bidirectional: bool, dtype: Any = None
) -> Float[Array, "#B N T T"]:
    """The bias of whole sequences, or `custom`."""
    if custom is not None:
        positions = jnp.arange(length)[None]
        return custom(table, positions, positions, bidirectional=bidirectional)
    options = {"max_distance": c.relative_max_distance, "bidirectional": bidirectional, "dtype": dtype}
    return relative_bias(table, queries=length, keys=length, **options)


def _first(query: Array, *_: Array, **__: Any) -> Array:
    """Stands in for attention during initialisation."""
    return query


class T5(FamilyModule):
    """The encoder-decoder; `dtype` is the compute dtype, parameters are created in float32."""

    config: T5Config  # architecture
    dtype: Any = jnp.float32  # of activations and matmul inputs; logits are float32
    islands: Islands = DEFAULT_ISLANDS  # dtypes of what does not follow `dtype`
    # an own attention (`jaxllm.models.functions`), here and in decoding; None is `config.attention`
    attend: Attend | None = None
    # an own bias from each table, here and in decoding; None is T5's relative bias
    position_bias: PositionBias | None = None

    def setup(self) -> None:
        """Creates the embedding that both stacks share, the stacks, and the head."""
        c = self.config
        if self.has_rng("dropout") and not self.is_initializing():
            raise ValueError("dropout takes key=, not rngs: model.apply(..., key=jax.random.key(0))")
        self.embed = self.param("embed", nn.initializers.normal(c.init_factor), (c.vocab_size, c.d_model), MASTER)
        self.encoder = Stack(c, self.dtype, self.islands, self.attend, self.position_bias, is_decoder=False)
        self.decoder = Stack(c, self.dtype, self.islands, self.attend, self.position_bias, is_decoder=True)
        if c.tie_embeddings:
            refuse(self, "lm_head")
        else:
            # As in T5X, and equal to v1.0's scaled tied head; a standard deviation of 1 starts at tens of nats.
            head = nn.initializers.normal(c.init_factor * c.d_model**-0.5)
            self.lm_head = self.param("lm_head", head, (c.vocab_size, c.d_model), MASTER)

    def __call__(
        self,
        encoder_tokens: Int[Array, "B S"],
        decoder_tokens: Int[Array, "B T"],
        *,
        encoder_segment_ids: Int[Array, "B S"] | None = None,
        decoder_segment_ids: Int[Array, "B T"] | None = None,
        encoder_lengths: Int[Array, " B"] | None = None,
        key: Array | None = None,
    ) -> Float[Array, "B T V"]:
        """Float32 logits of the target after each decoder token.

        Decoder tokens are targets shifted right, each document starting with `config.decoder_start_id`. Segment ids and
        lengths are the fields of `Documents`. `key` is that of dropout; without it nothing is dropped.

        Raises:
            ValueError: while tracing, for tokens that are not integers [B, T], lengths together with segment ids, or
                parameters of another model.
        """
        documents = Documents(encoder_segment_ids, decoder_segment_ids, encoder_lengths)
        return self.logits(self.hidden(encoder_tokens, decoder_tokens, documents, key=key))

    def hidden(
        self,
        encoder_tokens: Int[Array, "B S"],
        decoder_tokens: Int[Array, "B T"],
        documents: Documents = ONE_A_ROW,
        *,
        key: Array | None = None,
    ) -> Float[Array, "B T D"]:
        """What the head multiplies, for losses that never build all logits; arguments as `__call__`."""
        encoder_key, decoder_key = split_keys(key, 2)
        encoded = self.encode(encoder_tokens, documents, key=encoder_key)
        return self.decode(decoder_tokens, encoded, documents, key=decoder_key)

    def encode(
        self, encoder_tokens: Int[Array, "B S"], documents: Documents = ONE_A_ROW, *, key: Array | None = None
    ) -> Float[Array, "B S D"]:
        """The encoder's output; it has no meaning at padding."""
        check_tokens(encoder_tokens, "encoder_tokens")
        return self.encoder(self._embed(encoder_tokens), documents.encoder(*encoder_tokens.shape), key)

    def decode(
        self,
        decoder_tokens: Int[Array, "B T"],
        encoded: Float[Array, "#B S D"],
        documents: Documents = ONE_A_ROW,
        *,
        key: Array | None = None,
    ) -> Float[Array, "B T D"]:
        """The decoder's hidden state over an encoder's output, as `hidden` returns it."""
        check_tokens(decoder_tokens, "decoder_tokens")
        rows, (_, length, width) = decoder_tokens.shape[0], encoded.shape
        check_shape(encoded, "the encoder's output", (rows, length, width), (1, length, width))
        pattern = documents.decoder(*decoder_tokens.shape)
        cross_pattern = documents.cross(decoder_tokens.shape, encoded.shape[:2])
        x = self.decoder(self._embed(decoder_tokens), pattern, key, encoded, cross_pattern)
        return scale_output(self.config, x)

    def lens(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits of the decoder's residual stream at any layer, as `jaxllm.study` captures it: last norm, head."""
        return self.logits(scale_output(self.config, self.decoder.final_norm(x).astype(self.dtype)))

    def _embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return embed(self.embed, tokens, dtype=self.dtype).astype(self.islands.residual or stream_dtype(self.dtype))


def hidden(model: T5, params: Any, batch: Mapping[str, Any], key: Array | None = None) -> Float[Array, "B T D"]:
    """The decoder's hidden states of a batch: `encoder_tokens` [B, S], `decoder_tokens` [B, T], any of `Documents`."""
    tokens = batch["encoder_tokens"], batch["decoder_tokens"]
    return apply(model, params, *tokens, Documents.of(batch), key=key, method="hidden")


def train_flops(c: T5Config, batch: int, length: int, target_length: int) -> Flops:
    """Work of a train step on rows of `length` encoder tokens and `target_length` decoder tokens."""
    inner = c.num_heads * c.head_dim
    mlp = (3 if c.gated else 2) * c.d_model * c.d_ff
    block = 4 * c.d_model * inner + mlp
    encoder = c.num_layers * block * length
    decoder = c.num_decoder_layers * ((block + 2 * c.d_model * inner) * target_length + 2 * c.d_model * inner * length)
    weights = 6.0 * (encoder + decoder + c.vocab_size * c.d_model * target_length) * batch
    cross = c.num_layers * length**2 + c.num_decoder_layers * length * target_length
    self_attention = c.num_decoder_layers * target_length**2
    scale = 12.0 * inner * batch
    return Flops(weights + scale * (cross + self_attention / 2), weights + scale * (cross + self_attention), weights)
