"""Attention by blocks of queries, for any device and shape: what `attention` runs where no fused kernel can.

A block sees only the keys that its causal or windowed pattern can show, and only a block of scores exists at a time in
the forward pass. The backward rule is written out: it keeps the unnormalised weights of a block and needs no second
softmax, where autodiff under XLA:CPU computes the exponentials again in every product that reads them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.ops.linear import sum_of_outer

# Small enough for a block of scores to stay in a core's cache, large enough for an efficient product.
QUERY_BLOCK = 64
_MOST_BLOCKS = 16
# Weights of all blocks up to this size are kept for the backward pass; beyond it they are computed again.
_KEPT_BYTES = 2**28


def chunked_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    pattern: Any,
    scale: float,
    bias: Float[Array, "#B N T S"] | None,
) -> Float[Array, "B T N H"]:
    """softmax(scale * q k^T + bias) v over the keys that `pattern` (of `ops.attention`) shows."""
    batch, length, heads, width = query.shape
    keys, kv_heads = key.shape[1], key.shape[2]
    groups = heads // kv_heads
    query = query.reshape(batch, length, kv_heads, groups, width).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    # Both gradients of a key come from a product over queries: with S last, it transposes no scores.
    key, value = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 3, 1)  # [B, K, H, S]
    attend: Any = functools.partial(_block, scale)
    if batch * heads * length * keys * query.dtype.itemsize > _KEPT_BYTES:
        attend = jax.checkpoint(attend)
    block = max(QUERY_BLOCK, -(-length // _MOST_BLOCKS))
    bounds = [(start, min(start + block, length)) for start in range(0, length, block)]
    sizes = [stop - start for start, stop in bounds]
    # The gradient of a split is one concatenation; that of slices would be a padded sum per block.
    queries = jax.lax.split(query, sizes, axis=3)
    biases = [None] * len(sizes) if bias is None else jax.lax.split(bias, sizes, axis=2)
    outputs = []
    for (start, stop), part_query, part_bias in zip(bounds, queries, biases, strict=True):
        first = 0 if pattern.window is None else max(0, start - pattern.window + 1)
        last = min(stop, keys) if pattern.causal else keys
        mask = pattern.mask(range(start, stop), range(first, last))
        if mask is not None:
            mask = jnp.expand_dims(mask, (-4, -3)) if mask.ndim == 2 else mask[:, None, None]  # [#B, 1, 1, t, s]
        if part_bias is not None:
            part_bias = part_bias[..., first:last].reshape(-1, kv_heads, groups, stop - start, last - first)
        outputs.append(attend(part_query, key[..., first:last], value[..., first:last], part_bias, mask))
    joined = jnp.concatenate(outputs, axis=3)
    return joined.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block(scale: float, query: Array, key: Array, value: Array, bias: Array | None, mask: Array | None) -> Array:
    return _block_forward(scale, query, key, value, bias, mask)[0]


def _dot(equation: str, left: Array, right: Array) -> Array:
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.promote_types(left.dtype, jnp.float32))


def _fold(x: Array) -> Array:
    """[B, K, G, t, *] -> [B, K, G * t, *]: one product for all query heads of a key head."""
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], *x.shape[4:])


def _block_forward(
    scale: float, query: Array, key: Array, value: Array, bias: Array | None, mask: Array | None
) -> tuple[Array, Any]:
    shape = (*query.shape[:4], key.shape[3])  # [B, K, G, t, s]
    scores = scale * _dot("bkqh,bkhs->bkqs", _fold(query), key).reshape(shape)
    if bias is not None:
        scores += bias.astype(scores.dtype)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    if mask is not None:
        # A row that sees nothing has the minimum everywhere: measured from 0, all its weights vanish.
        largest = jnp.where(largest == jnp.finfo(scores.dtype).min, 0, largest)
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    total = jnp.where(total == 0, 1, total)
    weights = weights.astype(query.dtype)
    mixed = _dot("bkqs,bkhs->bkqh", _fold(weights), value).reshape(query.shape) / total
    out = mixed.astype(query.dtype)
    return out, (query, key, value, None if bias is None else bias[..., :0], weights, total, out)


def _block_backward(scale: float, saved: Any, grad: Array) -> tuple[Array, Array, Array, Array | None, None]:
    query, key, value, bias, weights, total, out = saved
    wide, dtype = total.dtype, query.dtype
    grad = (grad.astype(wide) / total).astype(dtype)
    value_grad = sum_of_outer(_fold(grad), _fold(weights))
    weight_grad = _dot("bkqh,bkhs->bkqs", _fold(grad), value).reshape(weights.shape)
    mean = jnp.sum(grad.astype(wide) * out.astype(wide), axis=-1, keepdims=True)
    score_grad = weights.astype(wide) * (weight_grad - mean)
    bias_grad = None
    if bias is not None:
        bias_grad = (score_grad if bias.shape[0] == query.shape[0] else _sum_rows(score_grad)).astype(bias.dtype)
    score_grad = _fold((scale * score_grad).astype(dtype))
    query_grad = _dot("bkqs,bkhs->bkqh", score_grad, key).reshape(query.shape)
    key_grad = sum_of_outer(_fold(query), score_grad)
    return query_grad.astype(dtype), key_grad.astype(dtype), value_grad.astype(dtype), bias_grad, None


def _sum_rows(x: Array) -> Array:
    """The sum over the first axis, kept, as a product: XLA:CPU takes 50 times longer to reduce a major axis."""
    return jnp.tensordot(jnp.ones((1, x.shape[0]), x.dtype), x, axes=1, precision=jax.lax.Precision.HIGHEST)


_block.defvjp(_block_forward, _block_backward)
