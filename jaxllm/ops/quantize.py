"""Int8 storage with float32 scales: weights per output channel, cached keys and values per token and head.

Storage only: matmuls convert back to the compute dtype, so what is saved is memory and the reading of it. Symmetric,
without zero points; a channel of zeros has scale 0. An integer cannot be NaN, so a channel that holds one has scale
NaN. Out of scope: quantised training, activations in int8.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from jaxllm.ops import backend


class Quantized(NamedTuple):
    """An array as values * scale, the scale broadcast over the axis that `quantize` reduced.

    Attributes:
        values: rounded to -127..127.
        scale: largest magnitude / 127, without the reduced axis.
    """

    values: Int8[Array, ...]
    scale: Float[Array, ...]


def quantize(x: Float[Array, ...], *, axis: int) -> Quantized:
    """Rounds to int8 with one scale for each slice along `axis`; the error is at most half a scale."""
    wide = x.astype(jnp.float32)
    scale = backend.largest_magnitude(wide, axis=axis) / 127
    safe = jnp.expand_dims(jnp.where(scale > 0, scale, 1), axis)
    return Quantized(jnp.round(wide / safe).astype(jnp.int8), scale)
