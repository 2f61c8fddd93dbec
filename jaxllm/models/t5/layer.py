"""One layer of T5's encoder or decoder: the same body for training, scoring, encoding of prompts and decoding.

What differs comes as arguments: the maps of the layer's parameters in either layout (`Parts`), attention with its
relative bias, and dropout. A layer works in the compute dtype; the residual stream has a dtype of its own, because T5's
outgrows float16. Scores are not divided by sqrt(head_dim): T5 puts that into q's initial size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.config import T5Config
from jaxllm.models.functions import Attend, Pairs, dense_mask
from jaxllm.models.hook_points import Drop, add, mark
from jaxllm.ops.attention import attention
from jaxllm.ops.masks import Pattern

Map = Callable[[Array], Array]
# Gives a layer its bias, from its own table where it has one (UMT5) or else the one that its stack shares.
BiasOf = Callable[[Array | None], Array | None]


class CrossParts(NamedTuple):
    """The maps of a decoder layer's attention over the encoder's output.

    Attributes:
        norm: in front of it, into the compute dtype.
        query: queries [B, T, N, H].
        keys_values: keys and values [B, S, N, H] of the encoder's output.
        out: of all heads [B, T, N * H].
    """

    norm: Map
    query: Map
    keys_values: Callable[[Array], tuple[Array, Array]]
    out: Map


class Parts(NamedTuple):
    """A layer's maps, each from its own parameters.

    Attributes:
        attn_norm: in front of attention, into the compute dtype.
        qkv: queries, keys and values [B, T, N, H].
        out: of all heads [B, T, N * H].
        cross: of the attention over the encoder's output; None in an encoder.
        mlp_norm: in front of the MLP, into the compute dtype.
        gate_up: the MLP's gate, None without one, and its factor, both [B, T, F].
        activation: of the gate, or of the factor alone.
        down: of the MLP's neurons [B, T, F], in the dtype that their sum needs.
    """

    attn_norm: Map
    qkv: Callable[[Array], tuple[Array, Array, Array]]
    out: Map
    cross: CrossParts | None
    mlp_norm: Map
    gate_up: Callable[[Array], tuple[Array | None, Array]]
    activation: Map
    down: Map


def layer_body(
    parts: Parts,
    x: Float[Array, "B T D"],
    attend: Callable[[Array, Array, Array], Array],
    attend_source: Map | None = None,
    drop: Drop | None = None,
) -> Float[Array, "B T D"]:
    """One pre-norm layer: x + attention(norm(x)), in a decoder cross-attention the same way, then x + mlp(norm(x)).

    Args:
        parts: the layer's maps.
        x: residual stream.
        attend: queries, keys and values of these tokens to the mixed values [B, T, N, H].
        attend_source: queries of these tokens to the mixed values of the encoder's output; None in an encoder.
        drop: dropout of a value at a place named as its sublayer, or `neurons`; None is no dropout.
    """
    x = mark(x, "input")
    x = add(x, _attention(parts, parts.attn_norm(x), attend), "attention", drop)
    if parts.cross is not None and attend_source is not None:
        update = _cross_attention(parts.cross, parts.cross.norm(x), attend_source)
        x = add(x, update, "cross_attention", drop)
    return add(x, _mlp(parts, parts.mlp_norm(x), drop), "mlp", drop)


@jax.named_scope("attention")
def _attention(parts: Parts, h: Array, attend: Callable[[Array, Array, Array], Array]) -> Array:
    query, key, value = parts.qkv(h)
    mixed = attend(mark(query, "query"), mark(key, "key"), mark(value, "value"))
    return parts.out(_joined(mark(mixed, "heads")))


@jax.named_scope("cross_attention")
def _cross_attention(parts: CrossParts, h: Array, attend: Map) -> Array:
    query = mark(parts.query(h), "query")
    mixed = mark(attend(query), "heads")
    return parts.out(_joined(mixed))


@jax.named_scope("mlp")
def _mlp(parts: Parts, h: Array, drop: Drop | None) -> Array:
    gate, up = parts.gate_up(h)
    up = mark(up, "up")
    neurons = parts.activation(up) if gate is None else parts.activation(mark(gate, "gate")) * up
    neurons = mark(neurons, "neurons")
    return parts.down(neurons if drop is None else drop(neurons, "neurons"))


def _joined(heads: Float[Array, "B T N H"]) -> Float[Array, "B T I"]:
    return heads.reshape(*heads.shape[:2], -1)


@jax.named_scope("cross_attention")
def source_keys_values(
    parts: CrossParts, encoded: Float[Array, "#B S D"], *, rows: int
) -> tuple[Float[Array, "B S N H"], Float[Array, "B S N H"]]:
    """What the encoder's output offers to the queries of a layer; one source may be that of all rows."""
    key, value = (jnp.broadcast_to(part, (rows, *part.shape[1:])) for part in parts.keys_values(encoded))
    return mark(key, "key"), mark(value, "value")


def whole_attention(
    config: T5Config, own: Attend | None, pattern: Pattern, *, queries: int, keys: int, softmax_dtype: Any = None
) -> Callable[..., Array]:
    """Attention over whole sequences, or a model's own: (query, key, value, bias=, drop=) to the mixed values."""
    if own is not None:
        pairs = Pairs(dense_mask(pattern, queries, keys), jnp.arange(queries)[None], jnp.arange(keys)[None])
        return lambda query, key, value, **found: own(query, key, value, pairs._replace(**found))
    return functools.partial(
        attention, pattern=pattern, scale=1.0, implementation=config.attention, softmax_dtype=softmax_dtype
    )


def own_or_shared(build: Map, table: Array | None) -> BiasOf:
    """The bias of each layer's own table, or that of the one which a stack shares, built once."""
    if table is None:
        return lambda own: None if own is None else build(own)
    shared = build(table)
    return lambda _: shared


def stream_dtype(dtype: Any) -> Any:
    """Dtype of the residual stream: T5's outgrows float16, whose largest number is 65504."""
    return jnp.float32 if jnp.dtype(dtype) == jnp.float16 else dtype


def scale_output(config: T5Config, x: Array) -> Array:
    """What the original T5 does before its tied head, x / sqrt(d_model); a factor in bfloat16 is 0.1 % off."""
    if not config.scale_logits:
        return x
    return (x.astype(jnp.promote_types(x.dtype, jnp.float32)) * config.d_model**-0.5).astype(x.dtype)
