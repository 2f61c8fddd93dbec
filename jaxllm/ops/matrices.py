"""Weight matrices as decoding stores and multiplies them: plain or in int8, and the way round that is read fastest.

A step of decoding is bound by reading every weight once, a few rows of activations at a time. Not here: training, whose
products are in `ops.linear`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.ops import backend
from jaxllm.ops.quantize import Quantized, quantize


class Rows(NamedTuple):
    """A matrix stored by its outputs, [F, D] as an embedding is, plain or quantised over D."""

    table: Array | Quantized


Matrix = Array | Quantized | Rows  # the first two are [D, F], quantised over D


def stored(kernel: Float[Array, "D F"], *, dtype: Any, int8: bool) -> Matrix:
    """A training kernel for decoding, the way round that a CPU multiplies fastest: by rows where those are long."""
    by_rows = kernel.shape[0] > kernel.shape[1] or kernel.shape[0] >= 768
    kernel = kernel.T if by_rows else kernel
    values = quantize(kernel, axis=int(by_rows)) if int8 else kernel.astype(dtype)
    return Rows(values) if by_rows else values


def project(x: Float[Array, "*B D"], matrix: Matrix, *, dtype: Any = None) -> Float[Array, "*B F"]:
    """X times a matrix of D inputs and F outputs, accumulated in float32, in `dtype` (None is x's)."""
    dtype, product = dtype or x.dtype, functools.partial(_times_columns, x)
    if isinstance(matrix, Rows):
        matrix, product = matrix.table, functools.partial(_times_rows, x)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if isinstance(matrix, Quantized):
        return (product(matrix.values.astype(x.dtype), preferred_element_type=wide) * matrix.scale).astype(dtype)
    # A GPU's units accumulate in float32 whatever the output is; elsewhere the output must be asked for in float32.
    return product(matrix, preferred_element_type=dtype if backend.on_gpu() else wide).astype(dtype)


def _times_columns(x: Array, kernel: Array, **options: Any) -> Array:
    # XLA:CPU reads a kernel of a few MB up to 1.5 times as fast for one row when it sees two products of half the sum;
    # a larger one, or for more rows, it reads faster whole.
    if backend.on_cpu() and x.size == len(kernel) and x.size % 2 == 0 and kernel.size <= 2**21:
        halves = jnp.einsum("pd,pdf->pf", x.reshape(2, -1), kernel.reshape(2, -1, kernel.shape[1]), **options)
        return halves.sum(0).reshape(*x.shape[:-1], -1)
    return jnp.einsum("...d,df->...f", x, kernel, **options)


def _times_rows(x: Array, table: Array, **options: Any) -> Array:
    if not backend.on_cpu():
        return jnp.einsum("...d,fd->...f", x, table, **options)
    # Faster with the table first; the barrier keeps XLA from turning the product round.
    columns = jax.lax.optimization_barrier(jnp.matmul(table, x.reshape(-1, x.shape[-1]).T, **options))
    return columns.T.reshape(*x.shape[:-1], -1)
