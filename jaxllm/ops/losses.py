"""Cross-entropy over a large vocabulary, without ever holding all logits.

The gradient is computed in the forward pass, chunk by chunk, with three matmuls with the head (logits, hidden gradient,
head gradient). Recomputation would take four. Sums, not means, cross this border.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.ops import backend
from jaxllm.ops.linear import custom_vjp, sum_of_outer


class LossSums(NamedTuple):
    """Sums over all weighted positions, float32 scalars; gradients flow from `loss` only.

    Attributes:
        loss: cross-entropy plus z-loss, to be minimised.
        nll: cross-entropy alone, in nats.
        weight: sum of the weights; a loss of a run returns that of `batch["weights"]`, by which a step divides.
        correct: weighted number of positions whose target has the largest logit; ties count.
    """

    loss: Float[Array, ""]
    nll: Float[Array, ""]
    weight: Float[Array, ""]
    correct: Float[Array, ""]


def chunked_cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    z_loss: float = 0.0,
    chunk: int = 1024,
    logits_dtype: Any = None,
) -> LossSums:
    """sum(weights * (logsumexp(l) - l[target] + z_loss * logsumexp(l) ** 2)) with l = hidden @ head.T in float32.

    `chunk` rows of logits exist at once, stored in float32 or `logits_dtype`. Their exponentials and all sums over the
    vocabulary are float32. Gradients flow to hidden and head. A target outside the vocabulary makes the sums NaN,
    except where its weight is 0. ValueError for targets or weights of another shape than [B, T]. Source: arXiv
    2204.02311 section 5 for the z-loss.
    """
    for name, value in (("targets", targets), ("weights", weights)):
        if value.shape != hidden.shape[:-1]:
            raise ValueError(f"{name} must be of shape {list(hidden.shape[:-1])}, got {list(value.shape)}")
    flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), weights.reshape(-1).astype(jnp.float32)
    chunk = min(chunk, len(flat[0]))
    padding = -len(flat[0]) % chunk
    if padding:
        flat = tuple(jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)) for x in flat)
    rows, flat_targets, flat_weights = (x.reshape(-1, chunk, *x.shape[1:]) for x in flat)
    sums: Any = _cross_entropy(z_loss, logits_dtype, rows, head, flat_targets, flat_weights)
    loss, nll, correct = sums
    return LossSums(loss, nll, jnp.sum(weights, dtype=jnp.float32), correct)


# Gradients of logits are probabilities, most of them below float16's smallest normal number: carry them 2^8 higher.
_INNER_SCALE = {jnp.dtype(jnp.float16): 256.0}

Pair = tuple[Array, Array]
Sums = tuple[Array, Array, Array]


@functools.partial(custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(z_loss: float, logits_dtype: Any, rows: Array, head: Array, targets: Array, weights: Array) -> Sums:
    def body(total: Sums, part: tuple[Array, Array, Array]) -> tuple[Sums, None]:
        sums, _, _ = _chunk_sums(z_loss, logits_dtype, head, *part)
        return jax.tree.map(jnp.add, total, sums), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(body, (zero, zero, zero), (rows, targets, weights))[0]


def _chunk_sums(
    z_loss: float, logits_dtype: Any, head: Array, rows: Array, targets: Array, weights: Array
) -> tuple[Sums, Array, tuple[Array, Array, Array]]:
    """The sums, the logits, and of each row the largest logit, the sum of exponentials from it, and logsumexp."""
    logits = jnp.einsum("nd,vd->nv", rows, head, preferred_element_type=jnp.float32)
    logits = logits if logits_dtype is None else logits.astype(logits_dtype)
    largest, total = _largest_and_sum(logits)
    normalizer = largest.astype(jnp.float32) + jnp.log(total)
    # A negative index would count from the end of the vocabulary; what is outside becomes NaN.
    index = jnp.where(targets < 0, logits.shape[-1], targets)
    target = jnp.take_along_axis(logits, index[:, None], axis=-1)[:, 0]
    # From the largest logit: the normaliser's rounding error can be thousands of times a small loss.
    nll = jnp.log(total) - (target.astype(jnp.float32) - largest.astype(jnp.float32))
    nll = jnp.where(weights == 0, 0.0, weights * nll)
    loss = nll + weights * z_loss * jnp.square(normalizer)
    correct = jnp.where(target >= largest, weights, 0)
    return (jnp.sum(loss), jnp.sum(nll), jnp.sum(correct)), logits, (largest, total, normalizer)


def _largest_and_sum(logits: Array) -> Pair:
    """Of each row the largest logit, as a constant, and the float32 sum of exponentials from it."""
    if backend.reduces_pairs():
        return _in_one_pass(logits)
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    return largest, jnp.sum(_exponentials(logits, largest), axis=-1)


def _exponentials(logits: Array, largest: Array) -> Array:
    """exp(logits - largest) in float32, however the logits are stored."""
    return jnp.exp(logits.astype(jnp.float32) - largest.astype(jnp.float32)[:, None])


@jax.custom_jvp
def _in_one_pass(logits: Array) -> Pair:
    """`_largest_and_sum` in one reduction, which reads the logits once and has no derivative in jax, hence the rule."""

    def join(left: Pair, right: Pair) -> Pair:
        largest = jnp.maximum(left[0], right[0])
        return largest, left[1] * jnp.exp(left[0] - largest) + right[1] * jnp.exp(right[0] - largest)

    wide = logits.astype(jnp.float32)
    # The smallest finite number: from -inf the first difference would be NaN.
    start = jnp.finfo(jnp.float32).min, jnp.float32(0)
    largest, total = jax.lax.reduce((wide, jnp.ones_like(wide)), start, join, dimensions=(1,))
    return largest.astype(logits.dtype), total


@_in_one_pass.defjvp
def _in_one_pass_slope(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Pair, Pair]:
    (logits,), (slope,) = primals, tangents
    largest, total = _in_one_pass(logits)
    change = jnp.sum(_exponentials(logits, largest) * slope, axis=-1)
    return (largest, total), (jnp.zeros_like(largest), change)


def _cross_entropy_forward(
    z_loss: float, logits_dtype: Any, rows: Array, head: Array, targets: Array, weights: Array
) -> tuple[Sums, tuple[Array, Array, Array]]:
    dtype = rows.dtype
    inner = _INNER_SCALE.get(dtype, 1.0)

    def body(carry: tuple[Sums, Array], part: tuple[Array, Array, Array]) -> tuple[tuple[Sums, Array], Array]:
        total, head_grad = carry
        part_rows, part_targets, part_weights = part
        sums, logits, (largest, softmax_sum, normalizer) = _chunk_sums(z_loss, logits_dtype, head, *part)
        # d loss / d logits = weight * ((1 + 2 z lse) softmax - one_hot), rounded to the compute dtype once.
        slope = inner * part_weights * (1 + 2 * z_loss * normalizer)
        hot = part_targets[:, None] == jnp.arange(logits.shape[-1])[None, :]
        grad = (slope / softmax_sum)[:, None] * _exponentials(logits, largest)
        grad = (grad - jnp.where(hot, (inner * part_weights)[:, None], 0)).astype(dtype)
        row_grad = jnp.einsum("nv,vd->nd", grad, head, preferred_element_type=jnp.float32)
        head_grad += sum_of_outer(part_rows, grad)
        return (jax.tree.map(jnp.add, total, sums), head_grad), row_grad

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, zero), jnp.zeros(head.shape[::-1], jnp.float32)
    (total, head_grad), row_grads = jax.lax.scan(body, start, (rows, targets, weights))
    # Row gradients stay in float32 until the slope multiplies them, and are rounded once. Large heads put them past
    # float16 at the inner scale, which no loss scale lowers. An empty array carries the dtype.
    return total, (row_grads, head_grad.T, jnp.empty(0, dtype))


def _cross_entropy_backward(
    z_loss: float, logits_dtype: Any, saved: tuple[Array, Array, Array], grads: Sums
) -> tuple[Array, Array, None, None]:
    row_grads, head_grad, like = saved
    dtype = like.dtype  # rows and head share the compute dtype
    slope = grads[0] / _INNER_SCALE.get(dtype, 1.0)
    return (slope * row_grads).astype(dtype), (slope * head_grad).astype(dtype), None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
