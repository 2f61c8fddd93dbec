"""A vector combined with every row of an activation, whose gradient is summed over the rows in float32.

Autodiff sums such a gradient (of a norm's weight, of a bias) in the dtype of the activation: thousands of rows in
bfloat16's 8 bits, or past float16's 65504. Out of scope: matrices, which `jaxllm.ops.linear` treats the same way.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rows_of(vector: Float[Array, " D"], like: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """`vector` repeated to the shape of `like`, in the vector's dtype."""
    if vector.dtype in (jnp.bfloat16, jnp.float16):
        return _rows(like.shape, vector)
    return jnp.broadcast_to(vector, like.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(shape: tuple[int, ...], vector: Array) -> Array:
    return jnp.broadcast_to(vector, shape)


def _rows_backward(shape: tuple[int, ...], saved: None, grad: Array) -> tuple[Array]:
    return (jnp.sum(grad, axis=tuple(range(grad.ndim - 1)), dtype=jnp.float32).astype(grad.dtype),)


_rows.defvjp(lambda shape, vector: (_rows(shape, vector), None), _rows_backward)
