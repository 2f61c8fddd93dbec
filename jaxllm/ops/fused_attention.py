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

# What a key of another document loses for each sign that differs, in units of a scaled score; exp(-104) is 0 in
# float32, the rest is how far a foreign score may lie above all of its own, and growing heads reach hundreds. More
# would cost digits: every sign of an equal code adds half a margin to a score.
_MARGIN = 256.0


def _largest_head() -> int:
    """By the GPU's generation: 0 before Ampere and for other makes; a machine without one lowers for the newest."""
    capability = getattr(jax.devices()[0], "compute_capability", "9.0")
    generation = int(capability.split(".")[0]) if capability[0].isdigit() else 0
    return 256 if generation >= 9 else 128 if generation == 8 else 0


def obstacle(
    query: Array, key: Array, *, bias: Array | None, causal: bool, window: int | None, packed: bool
) -> str | None:
    """Why `fused_attention` can't run this on an NVIDIA GPU, or None."""
    batch, length, heads, width = query.shape
    keys = key.shape[1]
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN needs float16 or bfloat16, got {query.dtype}"
    largest, total = _largest_head(), width + (code_width(length, keys) if packed else 0)
    if largest == 0:
        return "cuDNN's fused attention needs an NVIDIA GPU of the Ampere generation or newer"
    if width % 8 or total > largest:
        codes = f" with document codes to {total}" if packed else ""
        return f"cuDNN needs head_dim a multiple of 8 up to {largest}, got {width}{codes}"
    if causal and length != keys:
        return f"cuDNN aligns a causal mask at the top left, which differs for {length} queries and {keys} keys"
    if window is not None and not causal:
        return "cuDNN has a window for causal attention only"
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
    scale: float,
    causal: bool,
    window: int | None = None,
    bias: Float[Array, "#B N T S"] | None = None,
    query_segments: Int[Array, "B T"] | None = None,
    key_segments: Int[Array, "B S"] | None = None,
    query_lengths: Int[Array, " B"] | None = None,
    key_lengths: Int[Array, " B"] | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T N H"]:
    """Attention as `jaxllm.ops.attention` defines it; arguments are those of its `Pattern`.

    `implementation` xla gives the same operands to jax's own definition, so that the coding is tested without a GPU.
    """
    width = query.shape[-1]
    real = _real_queries(query.shape[1], query_segments, query_lengths)
    if key_lengths is not None and query_lengths is None:
        # jax would make them of a constant, which its rule for vmap takes for one of the rows.
        query_lengths = query.shape[1] + 0 * key_lengths
    if query_segments is not None and key_segments is not None:
        query, key, value = append_codes(query, key, value, query_segments, key_segments, scale=scale)
    mixed = jax.nn.dot_product_attention(
        query,
        key,
        value,
        # A float32 bias with low-precision queries gave NaN gradients in jax.
        bias=None if bias is None else bias.astype(query.dtype),
        scale=scale,
        is_causal=causal,
        query_seq_lengths=query_lengths,
        key_value_seq_lengths=key_lengths,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )[..., :width]
    return mixed if real is None else jnp.where(real[..., None, None], mixed, 0)


def _real_queries(length: int, segments: Array | None, lengths: Array | None) -> Array | None:
    inside = None if lengths is None else jnp.arange(length) < lengths[:, None]
    if segments is None:
        return inside
    return segments > 0 if inside is None else inside & (segments > 0)


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
