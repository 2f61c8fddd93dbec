"""Root-mean-square normalisation, the float32 island that both families share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.ops import backend
from jaxllm.ops.broadcast import rows_of


@jax.named_scope("norms")  # the precision ledger reads it
def rms_norm(
    x: Float[Array, "*B D"], weight: Float[Array, " D"], *, eps: float, inside: Any = None
) -> Float[Array, "*B D"]:
    """`weight * (x / sqrt(mean(x ** 2) + eps))`, the bracket in float32 and rounded to x's dtype before the product.

    `inside` is another dtype for the bracket, whose mean is accumulated in float32 all the same.

    Rounding before the weight is what Meta's and transformers' code do; the other order differs in bfloat16.
    Source: arXiv 1910.07467.
    """
    if backend.norms_a_second_row(x):
        return _of_one_row(x, weight, eps=eps, inside=inside)
    wide = x.astype(inside or jnp.promote_types(x.dtype, jnp.float32))
    variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return rows_of(weight, x) * (wide * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


def _of_one_row(
    x: Float[Array, "*B D"], weight: Float[Array, " D"], *, eps: float, inside: Any
) -> Float[Array, "*B D"]:
    """The norm of one row, computed as the first of two (`backend.norms_a_second_row`).

    The second row is half the first: of equal rows XLA would compute one, and a half cannot overflow.
    """
    rows = x.reshape(1, -1) * jnp.array([[1], [0.5]], x.dtype)
    return rms_norm(rows, weight, eps=eps, inside=inside)[0].reshape(x.shape)
