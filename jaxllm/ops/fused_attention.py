"""jax's cuDNN attention, and how documents packed into one row reach a kernel that knows causality and lengths only.

A mask would become a [B, N, T, S] bias, read in both passes and differentiated. Instead each document gets a code of
signs, appended to queries and keys as further dimensions of a head: equal codes add one constant to the score, which
the softmax cancels, and different codes add `_MARGIN` less or, mostly, twice that, which it rounds to zero. The kernel
stays the fused one, grouped heads and bias included; the price is a head wider by 8 or 16. jax has a packed layout for
cuDNN as well: it is private, strides keys by the number of query heads and bounds the documents of a row, so it is not
used.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.ops.cudnn_calls import Call, avoided
from jaxllm.ops.masks import Pattern

# What a key of another document loses for each sign that differs, in units of a scaled score; exp(-104) is 0 in
# float32, the rest is how far a foreign score may lie above all of its own, and growing heads reach hundreds. More
# would cost digits: every sign of an equal code adds half a margin to a score.
_MARGIN = 256.0


def _generation() -> int:
    """Major compute capability: 0 for other makes than NVIDIA's; a machine without a GPU lowers for Hopper."""
    capability = getattr(jax.devices()[0], "compute_capability", "9.0")
    return int(capability.split(".")[0]) if capability[0].isdigit() else 0


def obstacle(query: Array, key: Array, *, pattern: Pattern, bias: Array | None) -> str | None:
    """Why `fused_attention` can't run this on an NVIDIA GPU, or None."""
    call = call_of(query, key, pattern=pattern, bias=bias)
    limit, row = _limit(query, key, call, bias), avoided(call)
    if limit is not None or row is None:
        return limit
    return f"cuDNN is not trusted with {row.name}: {row.reason} ({row.evidence})"


def call_of(query: Array, key: Array, *, pattern: Pattern, bias: Array | None) -> Call:
    """What cuDNN is asked for, as the table of `jaxllm.ops.cudnn_calls` describes it."""
    (_, length, _, width), keys = query.shape, key.shape[1]
    packed, coded = pattern.query_segments is not None, width + code_width(length, keys)
    call = Call(
        generation=_generation(),
        dtype=str(query.dtype),
        queries=length,
        keys=keys,
        width=coded if packed else width,
        causal=pattern.causal,
        window=pattern.window is not None,
        bias=bias is not None,
        lengths=_lengths_for_cudnn(pattern) is not None,
        packed=packed,
    )
    row = avoided(call)
    if row is None or row.instead != "codes":
        return call
    return call._replace(lengths=False, packed=True, width=coded)


def _lengths_for_cudnn(pattern: Pattern) -> Array | None:
    """Real keys of each row, at least one: cuDNN 9.22 gives NaN for a row without keys (cudnn-frontend#943).

    None for a causal row, where padding comes after all that its real queries see. A model bounds its lengths once and
    says so by `some_keys`: bounded here, they would be computed again in every layer, and in its backward pass.
    """
    if pattern.key_lengths is None or (pattern.causal and pattern.query_lengths is not None):
        return None
    return pattern.key_lengths if pattern.some_keys else jnp.maximum(pattern.key_lengths, 1)


def _limit(query: Array, key: Array, call: Call, bias: Array | None) -> str | None:
    """What jax's checks and cuDNN's would refuse."""
    batch, length, heads, width = query.shape
    keys = key.shape[1]
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN needs float16 or bfloat16, got {query.dtype}"
    largest = 256 if call.generation >= 9 else 128
    if call.generation < 8:
        return "cuDNN's fused attention needs an NVIDIA GPU of the Ampere generation or newer"
    if width % 8 or call.width > largest:
        codes = f" with document codes to {call.width}" if call.packed else ""
        return f"cuDNN needs head_dim a multiple of 8 up to {largest}, got {width}{codes}"
    if call.causal and length != keys:
        return f"cuDNN aligns a causal mask at the top left, which differs for {length} queries and {keys} keys"
    if call.window and not call.causal:
        return "cuDNN has a window for causal attention only"
    if call.window and call.lengths:
        return "cuDNN leaves the output undefined where a window holds padding only"
    if bias is not None and (length % 2 or keys % 2):
        return f"cuDNN differentiates a bias at even lengths only, got {length} and {keys}"
    if bias is not None and bias.shape not in ((1, heads, length, keys), (batch, heads, length, keys)):
        return f"cuDNN broadcasts a bias over the batch only, got {bias.shape}"
    return None


def fused_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    pattern: Pattern,
    scale: float,
    bias: Float[Array, "#B N T S"] | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T N H"]:
    """Attention as `jaxllm.ops.attention` defines it.

    cuDNN computes a row of padding like any other, over at least one key, and it is hidden after that: what cuDNN
    leaves in a row without keys may be NaN, is saved for its backward pass, and times a gradient of 0 would reach the
    keys of other rows. So a row with `key_lengths` 0 and no `query_lengths` gives its first value instead of zeros.

    `implementation` xla gives the same operands to jax's own definition, so that the coding is tested without a GPU.
    """
    width, length = query.shape[-1], query.shape[1]
    call = call_of(query, key, pattern=pattern, bias=bias)
    real = _real_queries(length, pattern.query_segments, pattern.query_lengths)
    lengths = _lengths_for_cudnn(pattern)
    query_segments, key_segments = pattern.query_segments, pattern.key_segments
    if lengths is not None and not call.lengths:
        query_segments, key_segments = _lengths_as_segments(query, key, lengths, query_segments, key_segments)
        lengths = None
    if query_segments is not None and key_segments is not None:
        query, key, value = append_codes(query, key, value, query_segments, key_segments, scale=scale)
    mixed = jax.nn.dot_product_attention(
        query,
        key,
        value,
        # A float32 bias with low-precision queries gave NaN gradients in jax.
        bias=None if bias is None else bias.astype(query.dtype),
        scale=scale,
        is_causal=pattern.causal,
        # All queries. Left out, jax would make a constant of it, which its rule for vmap takes for one of the rows.
        query_seq_lengths=None if lengths is None else length + 0 * lengths,
        key_value_seq_lengths=lengths,
        local_window_size=None if pattern.window is None else (pattern.window - 1, 0),
        implementation=implementation,
    )[..., :width]
    return mixed if real is None else jnp.where(real[..., None, None], mixed, 0)


def _real_queries(length: int, segments: Array | None, lengths: Array | None) -> Array | None:
    inside = None if lengths is None else jnp.arange(length) < lengths[:, None]
    if segments is None:
        return inside
    return segments > 0 if inside is None else inside & (segments > 0)


def _lengths_as_segments(
    query: Array, key: Array, lengths: Array, query_segments: Array | None, key_segments: Array | None
) -> tuple[Array, Array]:
    """Documents of queries and keys that hide the keys from `lengths` on, within the documents that are given."""
    inside = jnp.arange(key.shape[1]) < lengths[:, None]
    if query_segments is None or key_segments is None:
        return jnp.ones(query.shape[:2], jnp.int32), inside.astype(jnp.int32)
    return query_segments, jnp.where(inside, key_segments, 0)


def code_width(length: int, keys: int) -> int:
    """Dimensions that tell apart as many documents as a row can hold, a multiple of 8 as cuDNN wants."""
    return 8 * math.ceil(max(length, keys).bit_length() / 8)


def append_codes(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    *,
    scale: float,
) -> tuple[Array, Array, Array]:
    """Queries and keys with their document's code behind each head, and values with zeros."""
    width, signs = code_width(query.shape[1], key.shape[1]), max(query.shape[1], key.shape[1]).bit_length() + 1
    # Codes that differ in one sign differ by 2 size^2 in their product.
    size = jnp.asarray(math.sqrt(_MARGIN / (2 * scale)), query.dtype)
    return (
        _append(query, size * _signs(query_segments, signs, width, query.dtype)),
        _append(key, size * _signs(key_segments, signs, width, key.dtype)),
        _append(value, jnp.zeros((*key_segments.shape, width), value.dtype)),
    )


def _signs(segments: Int[Array, "B T"], signs: int, width: int, dtype: jnp.dtype) -> Float[Array, "B T W"]:
    """Codes of `signs` signs, less what `width` has no room for, then zeros.

    Numbers n ^ 2 n differ in two bits at least, and n itself in one, which is left where the last sign has no room.
    """
    bits = ((segments ^ (segments << 1))[..., None] >> jnp.arange(width)) & 1
    return jnp.where(jnp.arange(width) < signs, 2 * bits - 1, 0).astype(dtype)


def _append(x: Float[Array, "B T N H"], code: Float[Array, "B T W"]) -> Float[Array, "B T N I"]:
    return jnp.concatenate([x, jnp.broadcast_to(code[:, :, None], (*x.shape[:3], code.shape[-1]))], axis=-1)
