"""Activations of the MLPs: computed in float32 and rounded once in each pass."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array


def _in_float32(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """An elementwise function computed in float32 and rounded once, in both passes; only x is kept for the second.

    Step by step in 16 bits the error of the slope is 2 to 8 times as large. In float16 GELU's cube is infinite from
    41 on, and its slope is NaN from 148 on under any loss scale.
    """

    @jax.custom_vjp
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
