"""Matmuls that accumulate in float32 and round once, forward and backward.

Autodiff would give the matmuls of the backward pass a 16-bit output instead of `backend.matmul_output`, hence the
custom rules (`custom_vjp`, for other modules too).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.ops import backend


class custom_vjp:
    """As `jax.custom_vjp`; the error of `jax.jvp`, `jacfwd`, `linearize` and `hessian` has the fix."""

    def __init__(self, function: Callable[..., Any], nondiff_argnums: Sequence[int] = ()) -> None:
        functools.update_wrapper(self, function)
        self._call: Any = jax.custom_vjp(function, nondiff_argnums=nondiff_argnums)
        self.defvjp = self._call.defvjp

    def __call__(self, *args: Any) -> Any:
        """The function's value; where jit has compiled it, jax's error comes later and shows the line of the call."""
        try:  # under jit, users see the comment of the next line in their trace
            return self._call(*args)  # for jvp, jacfwd, linearize, hessian: jaxllm.study.forward_mode(f) in place of f
        except TypeError as error:
            if "forward-mode" in str(error) and "jaxllm" not in str(error):
                error.args = (f"{error} Use jaxllm.study.forward_mode(f) in place of the differentiated function f.",)
            raise


def einsum(equation: str, left: Array, right: Array) -> Array:
    """A two-operand einsum accumulated in float32, in the dtype of `left`; for matmuls of two activations."""
    if left.dtype == jnp.float32 or left.dtype == jnp.float64:
        return jnp.einsum(equation, left, right)
    return _einsum(equation, left, right)


def _contract(equation: str, left: Array, right: Array) -> Array:
    output = backend.matmul_output(left.dtype)
    return jnp.einsum(equation, left, right, preferred_element_type=output).astype(left.dtype)


def sum_of_outer(
    left: Float[Array, "*B N D"], right: Float[Array, "*B N F"], *, dtype: Any = None
) -> Float[Array, "*B D F"]:
    """`left^T @ right`, the gradient of a matrix, in `dtype`; None is float32, for sums that are added to others."""
    dtype = dtype or jnp.promote_types(left.dtype, jnp.float32)
    if backend.needs_explicit_transpose(left):
        columns = backend.explicit_transpose(left)
        return jnp.einsum("...dn,...nf->...df", columns, right, preferred_element_type=dtype)
    return jnp.einsum("...nd,...nf->...df", left, right, preferred_element_type=dtype)


@custom_vjp
def linear(x: Float[Array, "*B D"], kernel: Float[Array, "D F"]) -> Float[Array, "*B F"]:
    """`x @ kernel` over the last axis, accumulated in float32, in the dtype of x."""
    return _contract("...d,df->...f", x, kernel)


def _linear_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, kernel = saved
    rows = x.reshape(-1, x.shape[-1])
    grads = grad.reshape(-1, grad.shape[-1])
    dtype = backend.matmul_output(kernel.dtype)
    kernel_grad = sum_of_outer(rows, grads, dtype=dtype)
    return _contract("...f,df->...d", grad, kernel), kernel_grad.astype(kernel.dtype)


linear.defvjp(lambda x, kernel: (linear(x, kernel), (x, kernel)), _linear_backward)


@custom_vjp
def biased_linear(
    x: Float[Array, "*B D"], kernel: Float[Array, "D F"], bias: Float[Array, " F"]
) -> Float[Array, "*B F"]:
    """`x @ kernel + bias`; the bias joins the float32 accumulator, so that the sum too is rounded once."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    product = jnp.einsum("...d,df->...f", x, kernel, preferred_element_type=wide)
    return (product + bias.astype(wide)).astype(x.dtype)


def _biased_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array, Array]:
    total = jnp.sum(grad, axis=range(grad.ndim - 1), dtype=jnp.promote_types(grad.dtype, jnp.float32))
    return *_linear_backward(saved, grad), total.astype(grad.dtype)


biased_linear.defvjp(lambda x, kernel, bias: (biased_linear(x, kernel, bias), (x, kernel)), _biased_backward)


@functools.partial(custom_vjp, nondiff_argnums=(0,))
def _einsum(equation: str, left: Array, right: Array) -> Array:
    return _contract(equation, left, right)


def _einsum_backward(equation: str, saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    left, right = saved
    inputs, output = equation.split("->")
    a, b = inputs.split(",")
    return _contract(f"{output},{b}->{a}", grad, right), _contract(f"{output},{a}->{b}", grad, left)


_einsum.defvjp(lambda equation, *operands: (_contract(equation, *operands), operands), _einsum_backward)


@custom_vjp
def linear_float32(x: Float[Array, "*B D"], kernel: Float[Array, "D F"]) -> Float[Array, "*B F"]:
    """`x @ kernel` in float32, for sums that x's dtype cannot hold; the gradients are in x's dtype."""
    return jnp.einsum("...d,df->...f", x, kernel, preferred_element_type=jnp.float32)


def _linear_float32_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    return _linear_backward(saved, grad.astype(saved[0].dtype))


linear_float32.defvjp(lambda x, kernel: (linear_float32(x, kernel), (x, kernel)), _linear_float32_backward)
