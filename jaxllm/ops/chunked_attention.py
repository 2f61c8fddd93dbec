"""Attention by blocks of queries, for any device and shape: what `attention` runs where no fused kernel can.

A block sees only the keys that its causal or windowed pattern can show, and only a block of scores exists at a time in
the forward pass. The backward pass is written out: it takes the unnormalised weights of a block as they were, or where
those of all blocks are large, computes them again from each query's largest score (arXiv 2205.14135, section 3.1);
and it sums a key's gradients over the blocks in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.ops.linear import sum_of_outer
from jaxllm.ops.masks import Pattern

# A block of scores is to stay near a core's cache and yet to be an efficient product: up to 128 queries, or a quarter
# of a causal sequence, whose blocks leave out what they cannot see; for long sequences what makes 16 blocks.
QUERY_BLOCK = 64
_LARGE_BLOCK = 128
_MOST_BLOCKS = 16
# Weights of all blocks up to this size are kept for the backward pass; beyond it they are computed again.
_KEPT_BYTES = 2**28


def chunked_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    pattern: Pattern,
    scale: float,
    bias: Float[Array, "#B N T S"] | None,
) -> Float[Array, "B T N H"]:
    """softmax(scale * q k^T + bias) v over the keys that `pattern` shows."""
    batch, length, heads, width = query.shape
    kv_heads = key.shape[2]
    groups = heads // kv_heads
    query = query.reshape(batch, length, kv_heads, groups, width).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    # Both gradients of a key come from a product over queries: with S last, it transposes no scores.
    key, value = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 3, 1)  # [B, K, H, S]
    if bias is not None:
        bias = bias.reshape(-1, kv_heads, groups, *bias.shape[2:])  # [#B, K, G, T, S]
    keep = batch * heads * length * key.shape[3] * query.dtype.itemsize <= _KEPT_BYTES
    rule = _Rule(scale, pattern.causal, pattern.window, keep)
    out: Array = _attend(rule, _Operands(query, key, value, bias), pattern._replace(causal=False, window=None))
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)


class _Rule(NamedTuple):
    """What is known when the program is traced; `keep` says whether the backward pass is given the weights."""

    scale: float
    causal: bool
    window: int | None
    keep: bool


class _Operands(NamedTuple):
    query: Float[Array, "B K G T H"]
    key: Float[Array, "B K H S"]
    value: Float[Array, "B K H S"]
    bias: Float[Array, "#B K G T S"] | None


def _blocks(rule: _Rule, length: int, keys: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, each with the keys that one of its queries may see."""
    large = min(_LARGE_BLOCK, length // 4) if rule.causal else _LARGE_BLOCK
    block = max(QUERY_BLOCK, large, -(-length // _MOST_BLOCKS))
    for start in range(0, length, block):
        stop = min(start + block, length)
        first = 0 if rule.window is None else max(0, start - rule.window + 1)
        yield slice(start, stop), slice(first, min(stop, keys) if rule.causal else keys)


def _scores(rule: _Rule, operands: _Operands, pattern: Pattern, rows: slice, columns: slice) -> Array:
    """Scores [B, K, G * t, s] of a block; where nothing may be seen, the smallest number.

    Four axes from here to the next product: over five, XLA:CPU makes a pass over memory of each of the softmax's steps.
    """
    query = operands.query[..., rows, :]
    scores = rule.scale * _dot("bkqh,bkhs->bkqs", _fold(query), operands.key[..., columns])
    if operands.bias is not None:
        scores += _fold(operands.bias[..., rows, columns]).astype(scores.dtype)
    pattern = pattern._replace(causal=rule.causal, window=rule.window)
    mask = pattern.mask(range(rows.start, rows.stop), range(columns.start, columns.stop))
    if mask is None:
        return scores
    mask = mask[None, None, None] if mask.ndim == 2 else mask[:, None, None]
    groups = jnp.broadcast_to(mask, (mask.shape[0], 1, *query.shape[2:4], columns.stop - columns.start))
    return jnp.where(_fold(groups), scores, jnp.finfo(scores.dtype).min)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule: _Rule, operands: _Operands, pattern: Pattern) -> Array:
    return _forward(rule, operands, pattern)[0]


def _forward(rule: _Rule, operands: _Operands, pattern: Pattern) -> tuple[Array, Any]:
    query, key, value, _ = operands
    unfold = functools.partial(_unfold, query.shape[2])
    outputs, largests, totals, kept = [], [], [], []
    for rows, columns in _blocks(rule, query.shape[3], key.shape[3]):
        scores = _scores(rule, operands, pattern, rows, columns)
        # A query that sees nothing has the minimum everywhere: measured from half of it, all its weights vanish. Of
        # one that sees something the largest weight is 1. XLA:CPU fuses both maxima, where selections cost a pass.
        largest = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), jnp.finfo(scores.dtype).min / 2)
        weights = jnp.exp(scores - largest)
        total = jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1)
        weights = weights.astype(query.dtype)
        mixed = _dot("bkqs,bkhs->bkqh", weights, value[..., columns]) / total
        outputs.append(unfold(mixed))
        largests.append(unfold(largest))
        totals.append(unfold(total))
        kept.append(weights if rule.keep else None)
    out, largest, total = (jnp.concatenate(parts, axis=3) for parts in (outputs, largests, totals))
    # The backward pass takes the output before it is rounded: all of a query's scores share the error of their mean,
    # which keys with something in common do not average out (arXiv 2510.04212).
    return out.astype(query.dtype), (operands, pattern, out, largest, total, kept)


def _backward(rule: _Rule, saved: Any, grad: Array) -> tuple[_Operands, None]:
    operands, pattern, out, largest, total, kept = saved
    query, key, value, bias = operands
    unfold = functools.partial(_unfold, query.shape[2])
    wide, dtype = total.dtype, query.dtype
    # Someone must still divide by the sum of the weights, up to S: before the products the gradient that came; but
    # that would leave float16's range, so there the weights for values, and for keys one half (its root) the scores'
    # gradients and one the queries, which for all of it may be too small themselves.
    early, late = 1 / total, jnp.ones_like(total)
    if dtype == jnp.float16:
        early, late = late, early
    root = jnp.sqrt(late)
    scaled_query, scaled_grad = (query * root).astype(dtype), (grad * early).astype(dtype)
    means = unfold(jnp.sum(_fold(scaled_grad).astype(wide) * _fold(out), axis=-1, keepdims=True))
    query_grads, bias_grads = [], []
    key_grad = value_grad = jnp.zeros(key.shape, wide)
    for (rows, columns), weights in zip(_blocks(rule, query.shape[3], key.shape[3]), kept, strict=True):
        if weights is None:
            scores = _scores(rule, operands, pattern, rows, columns)
            weights = jnp.exp(scores - _fold(largest[..., rows, :])).astype(dtype)
        block = [_fold(x[..., rows, :]) for x in (scaled_query, scaled_grad, means, late, root)]
        block_query, block_grad, block_means, block_late, block_root = block
        value_weights = (weights * block_late).astype(dtype)
        value_grad += _among_all(sum_of_outer(block_grad, value_weights), columns, key.shape[3])
        weight_grad = _dot("bkqh,bkhs->bkqs", block_grad, value[..., columns])
        score_grad = weights.astype(wide) * (weight_grad - block_means)
        if bias is not None:
            share = score_grad * block_late
            summed = share if bias.shape[0] == query.shape[0] else _sum_rows(share)
            bias_grads.append(_among_all(unfold(summed), columns, key.shape[3]).astype(bias.dtype))
        score_grad = (rule.scale * score_grad * block_root).astype(dtype)
        query_grad = _dot("bkqs,bkhs->bkqh", score_grad, key[..., columns]) * block_root
        query_grads.append(unfold(query_grad.astype(dtype)))
        key_grad += _among_all(sum_of_outer(block_query, score_grad), columns, key.shape[3])
    query_grad = jnp.concatenate(query_grads, axis=3)
    bias_grad = None if bias is None else jnp.concatenate(bias_grads, axis=3)
    return _Operands(query_grad, key_grad.astype(dtype), value_grad.astype(dtype), bias_grad), None


_attend.defvjp(_forward, _backward)


def _dot(equation: str, left: Array, right: Array) -> Array:
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.promote_types(left.dtype, jnp.float32))


def _fold(x: Array) -> Array:
    """[B, K, G, t, *] -> [B, K, G * t, *]: one product for all query heads of a key head."""
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], *x.shape[4:])


def _unfold(groups: int, x: Array) -> Array:
    """[B, K, G * t, *] -> [B, K, G, t, *]."""
    return x.reshape(*x.shape[:2], groups, -1, *x.shape[3:])


def _among_all(part: Array, columns: slice, keys: int) -> Array:
    """What belongs to some keys, on the last axis, with zeros for all others: XLA fuses such sums over the blocks."""
    return jnp.pad(part, [(0, 0)] * (part.ndim - 1) + [(columns.start, keys - columns.stop)])


def _sum_rows(x: Array) -> Array:
    """The sum over the first axis, kept, as a product: XLA:CPU takes 50 times longer to reduce a major axis."""
    return jnp.tensordot(jnp.ones((1, x.shape[0]), x.dtype), x, axes=1, precision=jax.lax.Precision.HIGHEST)
