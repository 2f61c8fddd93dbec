"""Root-mean-square normalisation, the float32 island that both families share."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.ops import backend


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


def rows_of(vector: Float[Array, " D"], like: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """`vector` repeated to the shape of `like`, in the vector's dtype, with a gradient that is summed in float32.

    Autodiff would sum thousands of rows in bfloat16's 8 bits, or past float16's 65504.
    """
    if vector.dtype in (jnp.bfloat16, jnp.float16):
        return _rows(like.shape, vector)
    return jnp.broadcast_to(vector, like.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(shape: tuple[int, ...], vector: Array) -> Array:
    return jnp.broadcast_to(vector, shape)


def _rows_backward(shape: tuple[int, ...], saved: None, grad: Array) -> tuple[Array]:
    return (jnp.sum(grad, axis=tuple(range(grad.ndim - 1)), dtype=jnp.float32).astype(grad.dtype),)


_rows.defvjp(lambda shape, vector: (_rows(shape, vector), None), _rows_backward)
