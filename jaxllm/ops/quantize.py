"""Int8 storage with float32 scales: weights per output channel, cached keys and values per token and head.

Matmuls convert back to the compute dtype, so int8 saves memory and the time to read it. Values are symmetric, without
zero points. A channel of zeros has scale 0, a channel with a NaN has scale NaN. Out of scope: quantised training,
activations in int8.
"""

from typing import NamedTuple

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
