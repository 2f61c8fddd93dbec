"""Int8 storage with float32 scales: weights per output channel, cached keys and values per token and head.

Storage only: products convert back to the compute dtype, so what is saved is memory and the reading of it. Symmetric,
without zero points; a channel of zeros has scale 0. Not here: quantised training, activations in int8.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from jaxllm.ops.linear import linear


class Quantized(NamedTuple):
    """An array as values * scale, the scale broadcast over the axis that `quantize` reduced.

    Attributes:
        values: rounded to -127..127.
        scale: largest magnitude / 127, without the reduced axis.
    """

    values: Int8[Array, ...]
    scale: Float[Array, ...]


Matrix = Array | Quantized


def quantize(x: Float[Array, ...], *, axis: int) -> Quantized:
    """Rounds to int8 with one scale for each slice along `axis`; the error is at most half a scale."""
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=axis) / 127
    safe = jnp.expand_dims(jnp.where(scale > 0, scale, 1), axis)
    return Quantized(jnp.round(wide / safe).astype(jnp.int8), scale)


def project(x: Float[Array, "*B D"], kernel: Matrix) -> Float[Array, "*B F"]:
    """X @ kernel, the kernel [D, F] plain or quantised over D (the scale then multiplies the product)."""
    if isinstance(kernel, Quantized):
        return linear(x, kernel.values.astype(x.dtype)) * kernel.scale.astype(x.dtype)
    return linear(x, kernel)


def project_rows(x: Float[Array, "*B D"], table: Matrix) -> Float[Array, "*B V"]:
    """Float32 x @ table.T, the table [V, D] plain or quantised over D."""
    values = table.values.astype(x.dtype) if isinstance(table, Quantized) else table
    dimensions = (((x.ndim - 1,), (1,)), ((), ()))
    product = jax.lax.dot_general(x, values, dimensions, preferred_element_type=jnp.float32)
    return product * table.scale if isinstance(table, Quantized) else product
