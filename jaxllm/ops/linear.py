"""Matrix products that accumulate in float32 and round once, forward and backward.

A low-precision `dot` whose output is asked for in bfloat16 runs 20 times slower on XLA:CPU than one with float32
output, so there both passes ask for float32 and cast. Autodiff would ask for the low-precision output in the backward
pass, hence the custom rule. A GPU's matrix units accumulate in float32 whatever the output is, and a float32 output
would be written and read once more. float32 inputs take the plain path.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def linear(x: Float[Array, "*B D"], kernel: Float[Array, "D F"]) -> Float[Array, "*B F"]:
    """X @ kernel over the last axis, accumulated in float32, in the dtype of x."""
    return _linear(x, kernel)


def biased_linear(
    x: Float[Array, "*B D"], kernel: Float[Array, "D F"], bias: Float[Array, " F"]
) -> Float[Array, "*B F"]:
    """X @ kernel + bias; the bias joins the float32 accumulator, so that the sum too is rounded once."""
    return _biased(x, kernel, bias)


def einsum(equation: str, left: Array, right: Array) -> Array:
    """A two-operand einsum accumulated in float32, in the dtype of `left`; for products of activations."""
    if left.dtype == jnp.float32 or left.dtype == jnp.float64:
        return jnp.einsum(equation, left, right)
    return _einsum(equation, left, right)


def _contract(equation: str, left: Array, right: Array) -> Array:
    if jax.default_backend() == "gpu":
        return jnp.einsum(equation, left, right)
    wide = jnp.promote_types(left.dtype, jnp.float32)
    return jnp.einsum(equation, left, right, preferred_element_type=wide).astype(left.dtype)


@jax.custom_vjp
def _linear(x: Array, kernel: Array) -> Array:
    return _contract("...d,df->...f", x, kernel)


def _linear_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _linear(x, kernel), (x, kernel)


def _linear_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, kernel = saved
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    # XLA:CPU transposes the first operand, fused with whatever made it: let that be the narrower one.
    if rows.shape[1] > grads.shape[1]:
        kernel_grad = _contract("nf,nd->fd", grads, rows).T
    else:
        kernel_grad = _contract("nd,nf->df", rows, grads)
    return _contract("...f,df->...d", grad, kernel), kernel_grad


_linear.defvjp(_linear_forward, _linear_backward)


@jax.custom_vjp
def _biased(x: Array, kernel: Array, bias: Array) -> Array:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    product = jnp.einsum("...d,df->...f", x, kernel, preferred_element_type=wide)
    return (product + bias.astype(wide)).astype(x.dtype)


def _biased_forward(x: Array, kernel: Array, bias: Array) -> tuple[Array, tuple[Array, Array]]:
    return _biased(x, kernel, bias), (x, kernel)


def _biased_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array, Array]:
    total = jnp.sum(grad, axis=range(grad.ndim - 1), dtype=jnp.promote_types(grad.dtype, jnp.float32))
    return *_linear_backward(saved, grad), total.astype(grad.dtype)


_biased.defvjp(_biased_forward, _biased_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum(equation: str, left: Array, right: Array) -> Array:
    return _contract(equation, left, right)


def _einsum_forward(equation: str, left: Array, right: Array) -> tuple[Array, tuple[Array, Array]]:
    return _contract(equation, left, right), (left, right)


def _einsum_backward(equation: str, saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    left, right = saved
    inputs, output = equation.split("->")
    a, b = inputs.split(",")
    return _contract(f"{output},{b}->{a}", grad, right), _contract(f"{output},{a}->{b}", grad, left)


_einsum.defvjp(_einsum_forward, _einsum_backward)


@jax.custom_vjp
def linear_float32(x: Float[Array, "*B D"], kernel: Float[Array, "D F"]) -> Float[Array, "*B F"]:
    """X @ kernel in float32 from low-precision factors: for sums that x's dtype cannot hold.

    The gradient comes back in x's dtype, as everywhere else.
    """
    return jnp.einsum("...d,df->...f", x, kernel, preferred_element_type=jnp.float32)


def _linear_float32_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    return _linear_backward(saved, grad.astype(saved[0].dtype))


linear_float32.defvjp(lambda x, kernel: (linear_float32(x, kernel), (x, kernel)), _linear_float32_backward)
