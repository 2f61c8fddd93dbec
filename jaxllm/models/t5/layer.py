"""One layer of T5's encoder and of its decoder, with dropout at T5's places and each bias from its stack or its own.

A layer works in the compute dtype; the residual stream has a dtype of its own, because T5's outgrows float16. Scores
are not divided by sqrt(head_dim): T5 puts that into q's initial size. Out of scope: the stacks (`jaxllm.models.t5`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.config import T5Config
from jaxllm.models.layers import ACTIVATIONS, DEFAULT_ISLANDS, MASTER, Islands, Linear, RMSNorm, refuse, site
from jaxllm.ops.attention import attention
from jaxllm.ops.dropout import dropout, split_keys
from jaxllm.ops.linear import linear_float32
from jaxllm.ops.masks import Pattern

# Gives a layer its bias, from its own table where it has one (UMT5) or else the one that its stack shares.
BiasOf = Callable[[Array | None], Array | None]


def stream_dtype(dtype: Any) -> Any:
    """Dtype of the residual stream: T5's outgrows float16, whose largest number is 65504."""
    return jnp.float32 if jnp.dtype(dtype) == jnp.float16 else dtype


def scale_output(config: T5Config, x: Array) -> Array:
    """What the original T5 does before its tied head, x / sqrt(d_model); a factor in bfloat16 is 0.1 % off."""
    if not config.scale_logits:
        return x
    return (x.astype(jnp.promote_types(x.dtype, jnp.float32)) * config.d_model**-0.5).astype(x.dtype)


class T5Attention(nn.Module):
    """Attention of x over a source, which is x itself or the encoder's output."""

    config: T5Config
    islands: Islands = DEFAULT_ISLANDS

    def setup(self) -> None:
        """Creates the four projections."""
        c = self.config
        inner, std = c.num_heads * c.head_dim, c.init_factor * c.d_model**-0.5
        self.q_proj = Linear(c.d_model, inner, std * c.head_dim**-0.5)
        self.k_proj = Linear(c.d_model, inner, std)
        self.v_proj = Linear(c.d_model, inner, std)
        self.o_proj = Linear(inner, c.d_model, c.init_factor * inner**-0.5)

    def __call__(
        self, x: Float[Array, "B T D"], source: Float[Array, "#B S D"], pattern: Pattern, bias: Any, key: Array | None
    ) -> Float[Array, "B T D"]:
        """Attention over whole sequences; `key` is for dropout on its weights."""
        c = self.config
        drop = None if key is None else functools.partial(dropout, key=key, rate=c.dropout_rate)
        # One source may be that of all rows.
        keys, values = (jnp.broadcast_to(part, (x.shape[0], *part.shape[1:])) for part in self.keys_values(source))
        mixed = attention(
            site(self._heads(self.q_proj(x)), "query"),
            site(keys, "key"),
            site(values, "value"),
            pattern=pattern,
            scale=1.0,
            bias=bias,
            implementation=c.attention,
            drop=drop,
            softmax_dtype=self.islands.softmax,
        )
        return self.o_proj(site(mixed, "heads").reshape(*x.shape[:2], -1))

    def keys_values(self, source: Float[Array, "B S D"]) -> tuple[Float[Array, "B S N H"], Float[Array, "B S N H"]]:
        """What the source offers to queries."""
        return self._heads(self.k_proj(source)), self._heads(self.v_proj(source))

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], self.config.num_heads, self.config.head_dim)


class T5MLP(nn.Module):
    """down(act(gate x) * up x), or down(act(up x)) when not gated."""

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

    def __call__(self, x: Float[Array, "B T D"], key: Array | None) -> Float[Array, "B T D"]:
        """Maps each position by itself; float16 in, float32 out, because this sum is what overflows in T5.

        `islands.mlp_output` makes it another dtype.
        """
        c = self.config
        activation, up = ACTIVATIONS[c.activation], site(self.up_proj(x), "up")
        h = activation(site(self.gate_proj(x), "gate")) * up if c.gated else activation(up)
        h = dropout(site(h, "neurons"), key, rate=c.dropout_rate)
        wide = self.islands.mlp_output or stream_dtype(h.dtype)
        if wide == h.dtype:
            return self.down_proj(h)
        return linear_float32(h, self.down_proj.kernel.astype(h.dtype)).astype(wide)


class EncoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

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
        self.attention = T5Attention(c, self.islands)
        self.mlp_norm = RMSNorm(c.d_model, c.norm_eps, self.islands.norms)
        self.mlp = T5MLP(c, self.islands)
        self.relative_bias = create_table(self, c) if c.relative_per_layer else None

    def __call__(
        self, x: Float[Array, "B S D"], pattern: Pattern, bias_of: BiasOf, key: Array | None
    ) -> Float[Array, "B S D"]:
        """One layer over whole sequences."""
        c, x = self.config, site(x, "input")
        weights_key, attention_key, inner_key, mlp_key = split_keys(key, 4)
        h = self.attn_norm(x).astype(self.dtype)
        bias = bias_of(self.relative_bias)
        x = _add(c, x, self.attention(h, h, pattern, bias, weights_key), attention_key, "attention")
        h = self.mlp_norm(x).astype(self.dtype)
        return _add(c, x, self.mlp(h, inner_key), mlp_key, "mlp")


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + cross_attention(norm(x), encoded), then x + mlp(norm(x)).

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
        self.attention = T5Attention(c, self.islands)
        self.cross_norm = RMSNorm(c.d_model, c.norm_eps, self.islands.norms)
        self.cross_attention = T5Attention(c, self.islands)
        self.mlp_norm = RMSNorm(c.d_model, c.norm_eps, self.islands.norms)
        self.mlp = T5MLP(c, self.islands)
        self.relative_bias = create_table(self, c) if c.relative_per_layer else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        encoded: Float[Array, "#B S D"],
        pattern: Pattern,
        cross_pattern: Pattern,
        bias_of: BiasOf,
        key: Array | None,
    ) -> Float[Array, "B T D"]:
        """One layer over whole sequences."""
        c, x = self.config, site(x, "input")
        weights_key, attention_key, cross_weights_key, cross_key, inner_key, mlp_key = split_keys(key, 6)
        h = self.attn_norm(x).astype(self.dtype)
        bias = bias_of(self.relative_bias)
        x = _add(c, x, self.attention(h, h, pattern, bias, weights_key), attention_key, "attention")
        h = self.cross_norm(x).astype(self.dtype)
        mixed = self.cross_attention(h, encoded, cross_pattern, None, cross_weights_key)
        x = _add(c, x, mixed, cross_key, "cross_attention")
        h = self.mlp_norm(x).astype(self.dtype)
        return _add(c, x, self.mlp(h, inner_key), mlp_key, "mlp")


def _add(c: T5Config, x: Array, update: Array, key: Array | None, name: str) -> Array:
    update = dropout(site(update, f"{name}_output"), key, rate=c.dropout_rate)
    return site(x + update.astype(x.dtype), f"after_{name}")


def create_table(module: nn.Module, c: T5Config) -> Float[Array, "R N"]:
    """The relative bias of a layer or of a stack."""
    std = c.init_factor * c.d_model**-0.5
    return module.param("relative_bias", nn.initializers.normal(std), (c.relative_buckets, c.num_heads), MASTER)
