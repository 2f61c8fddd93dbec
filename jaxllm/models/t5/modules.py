"""The parameters of T5's layers, for training and scoring, with dropout at T5's places."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from jaxllm.config import T5Config
from jaxllm.models.checks import refuse
from jaxllm.models.layers import DEFAULT_ISLANDS, MASTER, Islands, Linear, RMSNorm
from jaxllm.models.t5.layer import BiasOf, CrossParts, Parts, layer_body, source_keys_values, stream_dtype
from jaxllm.ops.activations import ACTIVATIONS
from jaxllm.ops.dropout import dropout, split_keys
from jaxllm.ops.linear import linear_float32

# Where dropout has a key of its own, in the order in which a layer's key is split.
_ENCODER_PLACES = ("weights", "attention", "neurons", "mlp")
_DECODER_PLACES = ("weights", "attention", "cross_weights", "cross_attention", "neurons", "mlp")


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
        """What asks."""
        return self._heads(self.q_proj(h))

    def keys_values(self, source: Float[Array, "B S D"]) -> tuple[Float[Array, "B S N H"], Float[Array, "B S N H"]]:
        """What the source offers to queries."""
        return self._heads(self.k_proj(source)), self._heads(self.v_proj(source))

    def out(self, mixed: Float[Array, "B T I"]) -> Float[Array, "B T D"]:
        """All heads into the residual stream's width."""
        return self.o_proj(mixed)

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
        """The gate, None when not gated, and its factor."""
        up = self.up_proj(h)
        return self.gate_proj(h) if self.config.gated else None, up

    def down(self, neurons: Float[Array, "B T F"]) -> Float[Array, "B T D"]:
        """Float16 in, float32 out, because this sum is what overflows in T5; `islands.mlp_output` is another dtype."""
        wide = self.islands.mlp_output or stream_dtype(neurons.dtype)
        if wide == neurons.dtype:
            return self.down_proj(neurons)
        return linear_float32(neurons, self.down_proj.kernel.astype(neurons.dtype)).astype(wide)


class _Layer(nn.Module):
    """What the layers of both stacks share.

    Attributes:
        config: architecture.
        dtype: of the sublayers; the residual stream keeps its own (`stream_dtype`).
        islands: dtypes of what does not follow it.
    """

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

    def _parts(self, cross: CrossParts | None) -> Parts:
        return Parts(
            attn_norm=lambda x: self.attn_norm(x).astype(self.dtype),
            qkv=self.attention.qkv,
            out=self.attention.out,
            cross=cross,
            mlp_norm=lambda x: self.mlp_norm(x).astype(self.dtype),
            gate_up=self.mlp.gate_up,
            activation=ACTIVATIONS[self.config.activation],
            down=self.mlp.down,
        )

    def _drops(self, places: tuple[str, ...], key: Array | None) -> dict[str, Callable[[Array], Array] | None]:
        """Dropout by place, each with its own key; None at all of them without a key."""
        keys = split_keys(key, len(places))
        drop = functools.partial(dropout, rate=self.config.dropout_rate)
        return {
            place: None if own is None else functools.partial(drop, key=own)
            for place, own in zip(places, keys, strict=True)
        }


class EncoderLayer(_Layer):
    """Attention over the source, then an MLP."""

    def __call__(
        self, x: Float[Array, "B S D"], attend: Callable[..., Array], bias_of: BiasOf, key: Array | None
    ) -> Float[Array, "B S D"]:
        """One layer over whole sequences; `attend` is a `whole_attention`."""
        drops = self._drops(_ENCODER_PLACES, key)
        attend = functools.partial(attend, bias=bias_of(self.relative_bias), drop=drops["weights"])
        return layer_body(self._parts(None), x, attend, drop=_at(drops))


class DecoderLayer(_Layer):
    """Attention over the targets so far, then over the encoder's output, then an MLP."""

    def setup(self) -> None:
        """Creates what an encoder layer has, and the attention over the encoder's output."""
        super().setup()
        c = self.config
        self.cross_norm = RMSNorm(c.d_model, c.norm_eps, self.islands.norms)
        self.cross_attention = T5Attention(c)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        encoded: Float[Array, "#B S D"],
        attend: Callable[..., Array],
        attend_cross: Callable[..., Array],
        bias_of: BiasOf,
        key: Array | None,
    ) -> Float[Array, "B T D"]:
        """One layer over whole sequences; `attend` and `attend_cross` are `whole_attention`s."""
        drops = self._drops(_DECODER_PLACES, key)
        attend = functools.partial(attend, bias=bias_of(self.relative_bias), drop=drops["weights"])
        cross = CrossParts(
            norm=lambda x: self.cross_norm(x).astype(self.dtype),
            query=self.cross_attention.query,
            keys_values=self.cross_attention.keys_values,
            out=self.cross_attention.out,
        )
        keys, values = source_keys_values(cross, encoded, rows=x.shape[0])

        def attend_source(query: Array) -> Array:
            return attend_cross(query, keys, values, bias=None, drop=drops["cross_weights"])

        return layer_body(self._parts(cross), x, attend, attend_source, _at(drops))


def _at(drops: dict[str, Callable[[Array], Array] | None]) -> Callable[[Array, str], Array]:
    def drop(x: Array, place: str) -> Array:
        found = drops[place]
        return x if found is None else found(x)

    return drop


def create_table(module: nn.Module, c: T5Config) -> Float[Array, "R N"]:
    """The relative bias of a layer or of a stack."""
    std = c.init_factor * c.d_model**-0.5
    return module.param("relative_bias", nn.initializers.normal(std), (c.relative_buckets, c.num_heads), MASTER)
