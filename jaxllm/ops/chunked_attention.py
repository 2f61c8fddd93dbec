"""Attention by blocks of queries, for any device and shape: what `attention` runs where no fused kernel can.

A block sees only the keys that its causal or windowed pattern can show. The forward pass holds one block of scores at a
time. The backward pass is written out and sums a key's gradients over the blocks in float32. It uses saved unnormalised
weights. Where those of all blocks are large, it computes them again from each query's largest score (arXiv 2205.14135,
section 3.1).
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.ops import backend
from jaxllm.ops.linear import custom_vjp, sum_of_outer
from jaxllm.ops.masks import Pattern

# A block of scores should fit a core's cache and still be an efficient matmul: 128 queries. In a causal sequence it is
# at most a quarter, but at least 64, so that blocks leave out keys that they cannot see. Long sequences have 16 blocks.
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
    # Both gradients of a key come from a matmul over queries: with S last, it transposes no scores.
    key, value = key.transpose(0, 2, 3, 1), value.transpose(0, 2, 3, 1)  # [B, K, H, S]
    if bias is not None:
        bias = bias.reshape(-1, kv_heads, groups, *bias.shape[2:])  # [#B, K, G, T, S]
    keep = batch * heads * length * key.shape[3] * query.dtype.itemsize <= _KEPT_BYTES
    rule = _Rule(scale, pattern.causal, pattern.window, keep)
    out: Array = _attend(rule, _Operands(query, key, value, bias), pattern._replace(causal=False, window=None))
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)


class _Rule(NamedTuple):
    """Constants of a trace; with `keep` the weights are saved for the backward pass."""

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
    """Scores [B, K, G * t, s] of a block, the smallest number where a query must not see a key."""
    # XLA:CPU fuses a softmax over these four axes; over [B, K, G, t, s] each step is a pass over memory.
    # Figure: with the maxima below and larger blocks, a train step takes 0.88 to 1.00 of the time; a softmax, no less.
    # Seen: jaxlib 0.10.2. Shown by: row `four axes`.
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


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def _attend(rule: _Rule, operands: _Operands, pattern: Pattern) -> Array:
    return _forward(rule, operands, pattern)[0]


def _forward(rule: _Rule, operands: _Operands, pattern: Pattern) -> tuple[Array, Any]:
    query, key, value, _ = operands
    unfold = functools.partial(_unfold, query.shape[2])
    outputs, largests, totals, kept = [], [], [], []
    for rows, columns in _blocks(rule, query.shape[3], key.shape[3]):
        scores = _scores(rule, operands, pattern, rows, columns)
        # A query that sees nothing has the minimum everywhere. Measured from half of it, all its weights vanish, and
        # every other query's largest weight is 1. XLA:CPU fuses maxima; selections would be a pass over memory.
        # Figure: 1.1 times the processor time without, for the softmax alone.
        # Seen: jaxlib 0.10.2. Shown by: row `maxima`.
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
    # The backward pass takes the output before it is rounded. All scores of a query share the error of their mean, and
    # similar keys do not average it out (arXiv 2510.04212).
    return out.astype(query.dtype), (operands, pattern, out, largest, total, kept)


class _Queries(NamedTuple):
    """What the backward pass needs of each query, [B, K, G, T, *]; see `_prepare_queries`."""

    query: Array  # times `root`, in the compute dtype
    grad: Array  # the output's gradient times `before`, in the compute dtype
    mean: Array  # of the weights' gradients under the softmax, sum(grad * out)
    after: Array
    root: Array  # the square root of `after`

    def block(self, rows: slice) -> "_Queries":
        return _Queries(*(_fold(x[..., rows, :]) for x in self))


def _prepare_queries(query: Array, grad: Array, out: Array, total: Array) -> _Queries:
    """Splits 1 / total, which the unnormalised weights leave to every gradient, into `before` and `after`.

    `before` is applied to the output's gradient. In float16 that would underflow. There `after` is applied to the
    weights for dV. Its square root is applied to the scores' gradients and to the queries for dK, because all of it
    could underflow in the queries too.
    """
    inverse, one = 1 / total, jnp.ones_like(total)
    before, after = (one, inverse) if query.dtype == jnp.float16 else (inverse, one)
    root = jnp.sqrt(after)
    scaled_query, scaled_grad = (query * root).astype(query.dtype), (grad * before).astype(query.dtype)
    mean = jnp.sum(_fold(scaled_grad).astype(total.dtype) * _fold(out), axis=-1, keepdims=True)
    return _Queries(scaled_query, scaled_grad, _unfold(query.shape[2], mean), after, root)


def _backward(rule: _Rule, saved: Any, grad: Array) -> tuple[_Operands, None]:
    """The gradients of all operands, by blocks of queries.

    With the probabilities P = weights / total and mean = sum(dO * O) of each query:

        dV = P^T dO          dS = P * (dO V^T - mean)     dbias = dS
        dQ = scale * dS K    dK = scale * dS^T Q
    """
    operands, pattern, out, largest, total, kept = saved
    query, key, value, bias = operands
    dtype, keys = query.dtype, key.shape[3]
    queries = _prepare_queries(query, grad, out, total)
    query_grads, bias_grads = [], []
    key_grad = value_grad = jnp.zeros(key.shape, total.dtype)
    for (rows, columns), weights in zip(_blocks(rule, query.shape[3], keys), kept, strict=True):
        if weights is None:
            scores = _scores(rule, operands, pattern, rows, columns)
            weights = jnp.exp(scores - _fold(largest[..., rows, :])).astype(dtype)
        block = queries.block(rows)
        value_weights = (weights * block.after).astype(dtype)
        value_grad += _among_all(sum_of_outer(block.grad, value_weights), columns, keys)
        weight_grad = _dot("bkqh,bkhs->bkqs", block.grad, value[..., columns])
        score_grad = weights.astype(total.dtype) * (weight_grad - block.mean)
        if bias is not None:
            bias_grad = score_grad * block.after
            if len(bias) != len(bias_grad):
                bias_grad = backend.sum_by_matmul(bias_grad, axis=0, keepdims=True)
            bias_grad = _among_all(_unfold(query.shape[2], bias_grad), columns, keys)
            bias_grads.append(bias_grad.astype(bias.dtype))
        score_grad = (rule.scale * score_grad * block.root).astype(dtype)
        query_grad = _dot("bkqs,bkhs->bkqh", score_grad, key[..., columns]) * block.root
        query_grads.append(_unfold(query.shape[2], query_grad.astype(dtype)))
        key_grad += _among_all(sum_of_outer(block.query, score_grad), columns, keys)
    query_grad = jnp.concatenate(query_grads, axis=3)
    bias_grad = None if bias is None else jnp.concatenate(bias_grads, axis=3)
    return _Operands(query_grad, key_grad.astype(dtype), value_grad.astype(dtype), bias_grad), None


_attend.defvjp(_forward, _backward)


def _dot(equation: str, left: Array, right: Array) -> Array:
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.promote_types(left.dtype, jnp.float32))


def _fold(x: Array) -> Array:
    """[B, K, G, t, *] -> [B, K, G * t, *]: one matmul for all query heads of a key head."""
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], *x.shape[4:])


def _unfold(groups: int, x: Array) -> Array:
    """[B, K, G * t, *] -> [B, K, G, t, *]."""
    return x.reshape(*x.shape[:2], groups, -1, *x.shape[3:])


def _among_all(part: Array, columns: slice, keys: int) -> Array:
    """A block's columns padded with zeros to all keys: XLA fuses such sums over the blocks."""
    return jnp.pad(part, [(0, 0)] * (part.ndim - 1) + [(columns.start, keys - columns.stop)])
