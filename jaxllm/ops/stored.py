"""Arrays as decoding stores and reads them: weight matrices in the layout that is read fastest, and int8 for both.

A step of decoding is bound by reading every weight, and all cached keys and values, once for a few rows of activations.
Int8 saves memory and the time to read it; matmuls convert back to the compute dtype. Weights have a float32 scale per
output channel, cached keys and values one per token and head. Values are symmetric, without zero points. A channel of
zeros has scale 0, one with a NaN has scale NaN. Out of scope: training (`jaxllm.ops.linear`), activations in int8.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from jaxllm.ops import backend


class Quantized(NamedTuple):
    """An array as values * scale, the scale broadcast over the axis that `quantize` reduced."""

    values: Int8[Array, "..."]  # rounded to -127..127
    scale: Float[Array, "..."]  # largest magnitude / 127, without the reduced axis


def quantize(x: Float[Array, "..."], *, axis: int) -> Quantized:
    """Rounds to int8 with one scale for each slice along `axis`; the error is at most half a scale."""
    wide = x.astype(jnp.float32)
    scale = backend.largest_magnitude(wide, axis=axis) / 127
    safe = jnp.expand_dims(jnp.where(scale > 0, scale, 1), axis)
    return Quantized(jnp.round(wide / safe).astype(jnp.int8), scale)


class Rows(NamedTuple):
    """A matrix stored by its outputs, [F, D] as an embedding is, plain or quantised over D."""

    table: Array | Quantized


Matrix = Array | Quantized | Rows  # the first two are [D, F], quantised over D


def stored(kernel: Float[Array, "D F"], *, dtype: Any, int8: bool) -> Matrix:
    """A training kernel as decoding stores it."""
    by_outputs = backend.stores_by_outputs(kernel)
    kernel = kernel.T if by_outputs else kernel
    values = quantize(kernel, axis=int(by_outputs)) if int8 else kernel.astype(dtype)
    return Rows(values) if by_outputs else values


def project(x: Float[Array, "*B D"], matrix: Matrix, *, dtype: Any = None) -> Float[Array, "*B F"]:
    """`x` times a matrix of D inputs and F outputs, accumulated in float32, in `dtype` (None is x's)."""
    dtype = dtype or x.dtype
    times = _times_kernel
    if isinstance(matrix, Rows):
        matrix, times = matrix.table, _times_table
    if isinstance(matrix, Quantized):
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return (times(x, matrix.values.astype(x.dtype), output=wide) * matrix.scale).astype(dtype)
    return times(x, matrix, output=backend.matmul_output(dtype)).astype(dtype)


def _times_kernel(x: Float[Array, "*B D"], kernel: Float[Array, "D F"], *, output: Any) -> Float[Array, "*B F"]:
    if backend.halves_sum(x, kernel):
        equation, halves = "pd,pdf->pf", (x.reshape(2, -1), kernel.reshape(2, -1, kernel.shape[1]))
        return jnp.einsum(equation, *halves, preferred_element_type=output).sum(0).reshape(*x.shape[:-1], -1)
    return jnp.einsum("...d,df->...f", x, kernel, preferred_element_type=output)


def _times_table(x: Float[Array, "*B D"], table: Float[Array, "F D"], *, output: Any) -> Float[Array, "*B F"]:
    if backend.multiplies_table_first():
        columns = jnp.matmul(table, x.reshape(-1, x.shape[-1]).T, preferred_element_type=output)
        return jax.lax.optimization_barrier(columns).T.reshape(*x.shape[:-1], -1)
    return jnp.einsum("...d,fd->...f", x, table, preferred_element_type=output)
