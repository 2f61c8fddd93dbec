"""What runs between matmuls: RMSNorm, activations, dropout; each in float32 and rounded once in each pass."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.ops import backend
from jaxllm.ops.linear import custom_vjp


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


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def _rows(shape: tuple[int, ...], vector: Array) -> Array:
    return jnp.broadcast_to(vector, shape)


def _rows_backward(shape: tuple[int, ...], saved: None, grad: Array) -> tuple[Array]:
    return (jnp.sum(grad, axis=tuple(range(grad.ndim - 1)), dtype=jnp.float32).astype(grad.dtype),)


_rows.defvjp(lambda shape, vector: (_rows(shape, vector), None), _rows_backward)


def _in_float32(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """An elementwise function computed in float32 and rounded once, in both passes; only x is kept for the second.

    Step by step in 16 bits the error of the slope is 2 to 8 times as large. In float16 GELU's cube is infinite from
    41 on, and its slope is NaN from 148 on under any loss scale.
    """

    @custom_vjp
    def low(x: Array) -> Array:
        return function(x.astype(jnp.float32)).astype(x.dtype)

    def backward(x: Array, grad: Array) -> tuple[Array]:
        (slope,) = jax.vjp(function, x.astype(jnp.float32))[1](grad.astype(jnp.float32))
        return (slope.astype(x.dtype),)

    low.defvjp(lambda x: (low(x), x), backward)
    return lambda x: low(x) if x.dtype in (jnp.bfloat16, jnp.float16) else function(x)


def _gelu_tanh(x: Array) -> Array:
    """0.5 x (1 + tanh(u)) as x * sigmoid(2 u): XLA:CPU takes 1.4 times as long for a gated MLP with the tanh."""
    return x * jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": _in_float32(jax.nn.silu),
    "gelu_tanh": _in_float32(_gelu_tanh),
    "gelu": _in_float32(lambda x: jax.nn.gelu(x, approximate=False)),
    "relu": jax.nn.relu,
}


def dropout(x: Float[Array, "*B"], key: Array | None, *, rate: float) -> Float[Array, "*B"]:
    """Zeroes a fraction `rate` of x and divides the rest by 1 - rate (arXiv 1207.0580); key None turns it off."""
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    # In float32: 1 - rate rounded to bfloat16 would scale every activation up to 0.2 % wrong.
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.where(kept, wide / (1 - rate), 0).astype(x.dtype)


def split_keys(key: Array | None, count: int) -> tuple[Array | None, ...]:
    """`count` independent keys; None gives as many Nones."""
    return (None,) * count if key is None else tuple(jax.random.split(key, count))
