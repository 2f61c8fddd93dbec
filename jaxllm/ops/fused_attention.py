"""jax's cuDNN attention, and documents packed into one row for a kernel that has causality and lengths but no mask.

A mask would become a [B, N, T, S] bias, read in both passes and differentiated. Instead, `document_codes` gives each
document d a vector of signs c(d), which is appended, times a size a, to the heads of its queries and keys:

    c(d) in {-1, 1}^W
    <c(d), c(e)> = W - 2 * (number of signs that differ)
    scale * (<q, k> + a^2 <c(d), c(e)>) = scale * <q, k> + constant - margin * (number of signs that differ)

with margin = 2 * scale * a^2. The softmax cancels the constant. Codes of two documents differ in at least one sign,
mostly in two, and one margin is enough for the softmax to round those weights to zero. The kernel stays fused, grouped
heads and bias included, and a head is wider by 8 or 16. jax also has a packed layout for cuDNN. It is private, strides
keys by the number of query heads and bounds the documents of a row, so it is not used.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.ops import backend
from jaxllm.ops.cudnn_calls import Call, avoided
from jaxllm.ops.masks import Pattern

# Penalty of a scaled score for each sign that differs. At 104 exp underflows in float32; the rest is headroom for
# scores of other documents, which reach hundreds. More would cost digits: every equal sign adds half a margin.
_MARGIN = 256.0


def obstacle(query: Array, key: Array, *, pattern: Pattern, bias: Array | None) -> str | None:
    """Why `fused_attention` can't run this on an NVIDIA GPU, or None: checks of jax and cuDNN, and avoided calls."""
    call = call_of(query, key, pattern=pattern, bias=bias)
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
    row = avoided(call)
    return None if row is None else f"cuDNN is not trusted with {row.name}: {row.reason} ({row.evidence})"


def call_of(query: Array, key: Array, *, pattern: Pattern, bias: Array | None) -> Call:
    """The call of cuDNN as the table of `jaxllm.ops.cudnn_calls` describes it."""
    (_, length, _, width), keys = query.shape, key.shape[1]
    packed = pattern.query_segments is not None
    generation = backend.gpu_generation()
    return Call(
        generation=9 if generation is None else generation,  # a machine without a GPU lowers for Hopper
        dtype=str(query.dtype),
        queries=length,
        keys=keys,
        width=width + code_width(max(length, keys)) if packed else width,
        causal=pattern.causal,
        window=pattern.window is not None,
        bias=bias is not None,
        lengths=_lengths_for_cudnn(pattern) is not None,
        packed=packed,
    )


def _lengths_for_cudnn(pattern: Pattern) -> Array | None:
    """Real keys of each row, at least one: cuDNN 9.22 gives NaN for a row without keys (cudnn-frontend#943).

    None for a causal row, where padding comes after all that its real queries see. With `some_keys` the model has
    bounded the lengths once. Bounds made here are computed again in every layer and its backward pass.
    """
    if pattern.key_lengths is None or (pattern.causal and pattern.query_lengths is not None):
        return None
    return pattern.key_lengths if pattern.some_keys else jnp.maximum(pattern.key_lengths, 1)


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
    """Attention as `jaxllm.ops.attention` defines it, except for rows without keys.

    cuDNN may leave NaN in a row without keys and saves it for the backward pass. Times a gradient of 0 it would reach
    the keys of other rows. So every row has at least one key, and rows of padding are set to zero afterwards. A row
    with `key_lengths` 0 and no `query_lengths` gives its first value instead of zeros.

    `implementation` xla gives the same operands to jax's own definition, which tests the codes without a GPU.
    """
    width, length = query.shape[-1], query.shape[1]
    query_segments, key_segments = pattern.query_segments, pattern.key_segments
    real = _real_queries(length, query_segments, pattern.query_lengths)
    lengths = _lengths_for_cudnn(pattern)
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
        # All queries. Without it jax makes a constant, which jax's rule for vmap mistakes for one of the rows.
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


def code_width(documents: int) -> int:
    """Dimensions of a code for as many documents as a row can hold, a multiple of 8 as cuDNN requires."""
    return 8 * math.ceil(documents.bit_length() / 8)


def append_codes(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    *,
    scale: float,
) -> tuple[Array, Array, Array]:
    """Queries and keys with their document's code appended to each head, and values with zeros."""
    documents = max(query.shape[1], key.shape[1])
    size = jnp.asarray(math.sqrt(_MARGIN / (2 * scale)), query.dtype)  # margin = 2 * scale * size^2
    return (
        _append(query, size * document_codes(query_segments, documents, query.dtype)),
        _append(key, size * document_codes(key_segments, documents, key.dtype)),
        _append(value, jnp.zeros((*key_segments.shape, code_width(documents)), value.dtype)),
    )


def document_codes(segments: Int[Array, "B T"], documents: int, dtype: jnp.dtype) -> Float[Array, "B T W"]:
    """A code of signs for each number 0 .. `documents`, followed by zeros.

    The signs are the bits of n ^ 2n. Those of two numbers differ in at least two bits, or in at least one where the
    width has no room for the last bit.
    """
    width, signs = code_width(documents), documents.bit_length() + 1
    bits = ((segments ^ (segments << 1))[..., None] >> jnp.arange(width)) & 1
    return jnp.where(jnp.arange(width) < signs, 2 * bits - 1, 0).astype(dtype)


def _append(x: Float[Array, "B T N H"], code: Float[Array, "B T W"]) -> Float[Array, "B T N I"]:
    return jnp.concatenate([x, jnp.broadcast_to(code[:, :, None], (*x.shape[:3], code.shape[-1]))], axis=-1)
