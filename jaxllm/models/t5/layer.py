"""One layer of T5's encoder or decoder: the same body for training, scoring, encoding of prompts and decoding.

Differences are arguments: the maps of the layer's parameters in either layout (`LayerMaps`, `CrossMaps`), attention
with its relative bias, and dropout. The parameters for training and scoring follow. A layer works in the compute dtype;
the residual stream has its own, because T5's outgrows float16. Scores are not divided by sqrt(head_dim): T5 includes
that in q's initial size.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.config import T5Config
from jaxllm.models.functions import Attend, Pairs, dense_mask
from jaxllm.models.layers import DEFAULT_ISLANDS, MASTER, Drop, Islands, LayerMaps, Linear, Map, RMSNorm, add, mark
from jaxllm.models.model import refuse
from jaxllm.ops.attention import attention
from jaxllm.ops.linear import linear_float32
from jaxllm.ops.masks import Pattern
from jaxllm.ops.pointwise import ACTIVATIONS, dropout, split_keys

# A layer's bias, given its own table (UMT5) or None: then its stack's bias.
BiasOf = Callable[[Array | None], Array | None]
# Places of dropout, in the order in which a layer's key is split.
_ENCODER_PLACES = ("weights", "attention", "neurons", "mlp")
_DECODER_PLACES = ("weights", "attention", "cross_weights", "cross_attention", "neurons", "mlp")


class CrossMaps(NamedTuple):
    """The maps of a decoder layer's attention over the encoder's output, as in `LayerMaps`."""

    norm: Map
    query: Map  # [B, T, N, H]
    keys_values: Callable[[Array], tuple[Array, Array]]  # of the encoder's output, [B, S, N, H]
    out: Map


def layer_body(
    maps: LayerMaps,
    x: Float[Array, "B T D"],
    attend: Callable[[Array, Array, Array], Array],
    cross: tuple[CrossMaps, Map] | None = None,
    drop: Drop | None = None,
) -> Float[Array, "B T D"]:
    """One pre-norm layer: x + attention(norm(x)), in a decoder cross-attention the same way, then x + mlp(norm(x)).

    Args:
        maps: the layer's maps.
        x: residual stream.
        attend: queries, keys and values of these tokens to the mixed values [B, T, N, H].
        cross: maps of the cross-attention, and queries to the mixed values of the encoder's output; None in an encoder.
        drop: dropout of a value at a place named as its sublayer, or `neurons`; without it nothing is dropped.
    """
    x = mark(x, "input")
    x = add(x, _attention(maps, maps.attn_norm(x), attend), "attention", drop)
    if cross is not None:
        cross_maps, attend_source = cross
        x = add(x, _cross_attention(cross_maps, cross_maps.norm(x), attend_source), "cross_attention", drop)
    return add(x, _mlp(maps, maps.mlp_norm(x), drop), "mlp", drop)


@jax.named_scope("attention")
def _attention(maps: LayerMaps, h: Array, attend: Callable[[Array, Array, Array], Array]) -> Array:
    query, key, value = maps.qkv(h)
    mixed = attend(mark(query, "query"), mark(key, "key"), mark(value, "value"))
    return maps.out(_joined(mark(mixed, "heads")))


@jax.named_scope("cross_attention")
def _cross_attention(maps: CrossMaps, h: Array, attend: Map) -> Array:
    mixed = attend(mark(maps.query(h), "query"))
    return maps.out(_joined(mark(mixed, "heads")))


@jax.named_scope("mlp")
def _mlp(maps: LayerMaps, h: Array, drop: Drop | None) -> Array:
    gate, up = maps.gate_up(h)
    up = mark(up, "up")
    neurons = mark(maps.activation(up) if gate is None else maps.activation(mark(gate, "gate")) * up, "neurons")
    return maps.down(neurons if drop is None else drop(neurons, "neurons"))


def _joined(heads: Float[Array, "B T N H"]) -> Float[Array, "B T I"]:
    return heads.reshape(*heads.shape[:2], -1)


@jax.named_scope("cross_attention")
def source_keys_values(
    maps: CrossMaps, encoded: Float[Array, "#B S D"], *, rows: int
) -> tuple[Float[Array, "B S N H"], Float[Array, "B S N H"]]:
    """A layer's keys and values of the encoder's output; all rows may share one source."""
    key, value = (jnp.broadcast_to(part, (rows, *part.shape[1:])) for part in maps.keys_values(encoded))
    return mark(key, "key"), mark(value, "value")


def whole_attention(
    config: T5Config, custom: Attend | None, pattern: Pattern, *, queries: int, keys: int, softmax_dtype: Any = None
) -> Callable[..., Array]:
    """Attention over whole sequences, or `custom`: (query, key, value, bias=, drop=) to the mixed values."""
    if custom is not None:
        pairs = Pairs(dense_mask(pattern, queries, keys), jnp.arange(queries)[None], jnp.arange(keys)[None])
        return lambda query, key, value, **found: custom(query, key, value, pairs._replace(**found))
    return functools.partial(
        attention, pattern=pattern, scale=1.0, implementation=config.attention, softmax_dtype=softmax_dtype
    )


def layer_bias(build: Map, shared: Array | None) -> BiasOf:
    """The bias of each layer's own table, or that of the stack's `shared` table, built once."""
    if shared is None:
        return lambda table: None if table is None else build(table)
    bias = build(shared)
    return lambda _: bias


def stream_dtype(dtype: Any) -> Any:
    """Dtype of the residual stream: T5's outgrows float16, whose largest number is 65504."""
    return jnp.float32 if jnp.dtype(dtype) == jnp.float16 else dtype


def scale_output(config: T5Config, x: Array) -> Array:
    """The original T5's x / sqrt(d_model) before its tied head; a factor in bfloat16 would be 0.1 % off."""
    if not config.scale_logits:
        return x
    return (x.astype(jnp.promote_types(x.dtype, jnp.float32)) * config.d_model**-0.5).astype(x.dtype)


class T5Attention(nn.Module):
    """Projections of an attention over a source, which is x itself or the encoder's output."""

    config: T5Config

    def setup(self) -> None:
        """Creates the four projections."""
        c = self.config
        inner, std = c.num_heads * c.head_dim, c.init_factor * c.d_model**-0.5
        self.q_proj = Linear(c.d_model, inner, std * c.head_dim**-0.5)
        self.k_proj = Linear(c.d_model, inner, std)
        self.v_proj = Linear(c.d_model, inner, std)
        self.o_proj = Linear(inner, c.d_model, c.init_factor * inner**-0.5)

    def qkv(self, h: Float[Array, "B T D"]) -> tuple[Array, Array, Array]:
        """Queries, keys and values of one input."""
        keys, values = self.keys_values(h)
        return self.query(h), keys, values

    def query(self, h: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        """Queries of one input."""
        return self._heads(self.q_proj(h))

    def keys_values(self, source: Float[Array, "B S D"]) -> tuple[Float[Array, "B S N H"], Float[Array, "B S N H"]]:
        """Keys and values of the source."""
        return self._heads(self.k_proj(source)), self._heads(self.v_proj(source))

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], self.config.num_heads, self.config.head_dim)


class T5MLP(nn.Module):
    """Projections of down(act(gate x) * up x), or of down(act(up x)) when not gated."""

    config: T5Config
    islands: Islands = DEFAULT_ISLANDS

    def setup(self) -> None:
        """Creates two or three projections."""
        c = self.config
        std = c.init_factor * c.d_model**-0.5
        if c.gated:
            self.gate_proj = Linear(c.d_model, c.d_ff, std)
        else:
            refuse(self, "gate_proj")
        self.up_proj = Linear(c.d_model, c.d_ff, std)
        self.down_proj = Linear(c.d_ff, c.d_model, c.init_factor * c.d_ff**-0.5)

    def gate_up(self, h: Float[Array, "B T D"]) -> tuple[Float[Array, "B T F"] | None, Float[Array, "B T F"]]:
        """The gate, None without one, and its factor."""
        up = self.up_proj(h)
        return self.gate_proj(h) if self.config.gated else None, up

    def down(self, neurons: Float[Array, "B T F"]) -> Float[Array, "B T D"]:
        """Float16 in, float32 out, because T5's sum overflows here; `islands.mlp_output` sets another dtype."""
        output_dtype = self.islands.mlp_output or stream_dtype(neurons.dtype)
        if output_dtype == neurons.dtype:
            return self.down_proj(neurons)
        return linear_float32(neurons, self.down_proj.kernel.astype(neurons.dtype)).astype(output_dtype)


class _Layer(nn.Module):
    """The base of the layers of both stacks; `dtype` is that of the sublayers."""

    config: T5Config
    dtype: Any
    islands: Islands = DEFAULT_ISLANDS

    def setup(self) -> None:
        """Creates the sublayers, their norms, and the bias table where each layer has its own."""
        c = self.config
        self.attn_norm = RMSNorm(c.d_model, c.norm_eps, self.islands.norms)
        self.attention = T5Attention(c)
        self.mlp_norm = RMSNorm(c.d_model, c.norm_eps, self.islands.norms)
        self.mlp = T5MLP(c, self.islands)
        self.relative_bias = create_table(self, c) if c.relative_per_layer else None

    def _maps(self) -> LayerMaps:
        return LayerMaps(
            attn_norm=lambda x: self.attn_norm(x).astype(self.dtype),
            qkv=self.attention.qkv,
            out=self.attention.o_proj,
            mlp_norm=lambda x: self.mlp_norm(x).astype(self.dtype),
            gate_up=self.mlp.gate_up,
            activation=ACTIVATIONS[self.config.activation],
            down=self.mlp.down,
        )

    def _drop(self, places: tuple[str, ...], key: Array | None) -> Drop:
        """Dropout with one key per place; without a key nothing is dropped."""
        keys = dict(zip(places, split_keys(key, len(places)), strict=True))
        return lambda x, place: dropout(x, keys[place], rate=self.config.dropout_rate)


class EncoderLayer(_Layer):
    """Attention over the source, then an MLP."""

    def __call__(
        self, x: Float[Array, "B S D"], attend: Callable[..., Array], bias_of: BiasOf, key: Array | None
    ) -> Float[Array, "B S D"]:
        """One layer over whole sequences; `attend` is a `whole_attention`."""
        drop = self._drop(_ENCODER_PLACES, key)
        attend = functools.partial(attend, bias=bias_of(self.relative_bias), drop=_of_weights(drop, "weights", key))
        return layer_body(self._maps(), x, attend, drop=drop)


class DecoderLayer(_Layer):
    """Attention over the targets so far, then over the encoder's output, then an MLP."""

    def setup(self) -> None:
        """Adds the attention over the encoder's output to the modules of an encoder layer."""
        super().setup()
        c = self.config
        self.cross_norm = RMSNorm(c.d_model, c.norm_eps, self.islands.norms)
        self.cross_attention = T5Attention(c)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        attend: Callable[..., Array],
        bias_of: BiasOf,
        key: Array | None,
        encoded: Float[Array, "#B S D"],
        attend_cross: Callable[..., Array],
    ) -> Float[Array, "B T D"]:
        """One layer over whole sequences; `attend` and `attend_cross` are `whole_attention`s."""
        drop = self._drop(_DECODER_PLACES, key)
        attend = functools.partial(attend, bias=bias_of(self.relative_bias), drop=_of_weights(drop, "weights", key))
        cross = CrossMaps(
            norm=lambda x: self.cross_norm(x).astype(self.dtype),
            query=self.cross_attention.query,
            keys_values=self.cross_attention.keys_values,
            out=self.cross_attention.o_proj,
        )
        keys, values = source_keys_values(cross, encoded, rows=x.shape[0])

        def attend_source(query: Array) -> Array:
            return attend_cross(query, keys, values, bias=None, drop=_of_weights(drop, "cross_weights", key))

        return layer_body(self._maps(), x, attend, (cross, attend_source), drop)


def _of_weights(drop: Drop, place: str, key: Array | None) -> Map | None:
    """Dropout of attention weights; None without a key, so that fused attention applies."""
    return None if key is None else lambda weights: drop(weights, place)


def create_table(module: nn.Module, c: T5Config) -> Float[Array, "R N"]:
    """The relative bias of a layer or of a stack."""
    std = c.init_factor * c.d_model**-0.5
    return module.param("relative_bias", nn.initializers.normal(std), (c.relative_buckets, c.num_heads), MASTER)
