"""One layer of a Llama: the same body for training, scoring, prefill and decoding.

What differs comes as arguments: the maps of the layer's parameters in either layout (`Parts`), and the two functions
that research code may replace, attention and positions.
"""

import functools
from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float, Int

from jaxllm.config import LlamaConfig
from jaxllm.models.functions import Attend, Pairs, Rotate, dense_mask
from jaxllm.models.layers import Map, Parts, add, mark
from jaxllm.ops.attention import attention
from jaxllm.ops.masks import Pattern
from jaxllm.ops.rope import apply_rope, rope_cos_sin, rope_frequencies


def layer_body(
    parts: Parts, x: Float[Array, "B T D"], attend: Callable[[Array, Array, Array], Array], rotate: Map
) -> Float[Array, "B T D"]:
    """One pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        parts: the layer's maps.
        x: residual stream.
        attend: queries, keys and values of these tokens to the mixed values [B, T, N, H].
        rotate: queries or keys [B, T, N, H] to the same with their positions in them.
    """
    x = mark(x, "input")
    query, key, value = parts.qkv(parts.attn_norm(x))
    query, key, value = mark(rotate(query), "query"), mark(rotate(key), "key"), mark(value, "value")
    mixed = mark(attend(query, key, value), "heads")
    x = add(x, parts.out(mixed.reshape(*x.shape[:2], -1)), "attention")
    gate, up = parts.gate_up(parts.mlp_norm(x))
    gate, up = mark(gate, "gate"), mark(up, "up")
    neurons = mark(parts.activation(gate) * up, "neurons")
    return add(x, parts.down(neurons), "mlp")


def rotation(config: LlamaConfig, own: Rotate | None, positions: Int[Array, "#B T"], *, length: int) -> Map:
    """Rotary positions, or a model's own; `length` is the context that dynamic and longrope scaling assume."""
    if own is not None:
        return lambda x: own(x, positions)
    frequencies, scaling = rope_frequencies(
        config.rope, head_dim=config.head_dim, max_length=config.max_length, length=length
    )
    cos, sin = rope_cos_sin(positions, frequencies, scaling)
    return lambda x: apply_rope(x, cos, sin)


def whole_attention(
    config: LlamaConfig,
    own: Attend | None,
    positions: Int[Array, "#B T"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    softmax_dtype: Any = None,
) -> Callable[[Array, Array, Array], Array]:
    """Causal attention over whole sequences, or a model's own, in documents or in rows of `lengths` tokens."""
    # Causal, with a window; queries and keys are the same tokens.
    pattern = Pattern(True, config.sliding_window, segment_ids, segment_ids, lengths, lengths)
    if own is not None:
        count = positions.shape[1]
        pairs = Pairs(dense_mask(pattern, count, count), positions, positions)
        return lambda query, key, value: own(query, key, value, pairs)
    return functools.partial(
        attention,
        pattern=pattern,
        scale=config.head_dim**-0.5,
        implementation=config.attention,
        softmax_dtype=softmax_dtype,
    )
