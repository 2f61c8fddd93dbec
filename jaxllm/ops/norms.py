"""Root-mean-square normalisation, the float32 island that both families share."""

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
    """`weight * (x / sqrt(mean(x ** 2) + eps))`, the bracket in float32 and rounded to x's dtype before the weight.

    `inside` is another dtype for the bracket; its mean is still accumulated in float32. Meta's and transformers' code
    round before the weight too; the other order differs in bfloat16. Source: arXiv 1910.07467.
    """
    if backend.norms_a_second_row(x):
        # As the first of two. The second is half of it, because XLA would merge equal rows.
        rows = x.reshape(1, -1) * jnp.array([[1], [0.5]], x.dtype)
        return rms_norm(rows, weight, eps=eps, inside=inside)[0].reshape(x.shape)
    wide = x.astype(inside or jnp.promote_types(x.dtype, jnp.float32))
    variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return rows_of(weight, x) * (wide * jax.lax.rsqrt(variance + eps)).astype(x.dtype)
