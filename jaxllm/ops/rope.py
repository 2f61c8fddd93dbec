"""Rotary position embedding (arXiv 2104.09864) and its extensions to longer contexts.

Frequencies are NumPy float32, made at trace time; angles, cosines and sines are float32 whatever the compute dtype.
Heads are rotated in halves (pairs i, i + H/2), the layout of Hugging Face files. Dynamic and longrope depend on the
length of the context: the caller names one static length for a whole generation, so that cached keys and new queries
share one set of frequencies. Reference: transformers/modeling_rope_utils.py.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxllm.config import RopeConfig


def rope_frequencies(
    config: RopeConfig, *, head_dim: int, max_length: int, length: int | None = None
) -> tuple[np.ndarray, float]:
    """Inverse frequencies float32 [head_dim / 2] and the factor on cos and sin.

    Args:
        config: kind and parameters.
        head_dim: width of a head.
        max_length: the model's context length.
        length: context length of this use, for dynamic and longrope; None is max_length.
    """
    length = max_length if length is None else length
    base = _inverse_frequencies(config.theta, head_dim)
    if config.type == "linear":
        return _single(base / np.float32(config.factor)), 1.0
    if config.type == "dynamic":
        return _dynamic(config, head_dim, max_length, length), 1.0
    if config.type == "llama3":
        return _llama3(config, base, max_length), 1.0
    if config.type == "yarn":
        return _yarn(config, base, head_dim, max_length)
    if config.type == "longrope":
        return _longrope(config, head_dim, max_length, length)
    return base, 1.0


def rope_cos_sin(
    positions: Int[Array, "B T"], frequencies: Float[np.ndarray, " P"], scaling: float
) -> tuple[Float[Array, "B T P"], Float[Array, "B T P"]]:
    """Float32 cosines and sines of position * frequency, times `scaling`."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles) * scaling, jnp.sin(angles) * scaling


def apply_rope(
    x: Float[Array, "B T N H"], cos: Float[Array, "#B T P"], sin: Float[Array, "#B T P"]
) -> Float[Array, "B T N H"]:
    """Rotates the pairs (i, i + H/2) of each head; cos and sin are rounded to x's dtype first, as the reference."""
    cos, sin = cos[:, :, None].astype(x.dtype), sin[:, :, None].astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _single(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float32)


def _inverse_frequencies(theta: float, head_dim: int) -> np.ndarray:
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return _single(1.0 / np.power(np.float64(theta), exponents.astype(np.float64)))


def _dynamic(config: RopeConfig, head_dim: int, max_length: int, length: int) -> np.ndarray:
    """Base grown with the length beyond max_length (NTK-aware, reddit u/emozilla)."""
    factor, reached = config.factor or 1.0, max(length, max_length)
    growth = factor * reached / max_length - (factor - 1)
    return _inverse_frequencies(config.theta * growth ** (head_dim / (head_dim - 2)), head_dim)


def _llama3(config: RopeConfig, base: np.ndarray, max_length: int) -> np.ndarray:
    """Long waves divided by factor, short ones kept, a linear blend between (arXiv 2407.21783)."""
    original = config.original_max_length or max_length
    low, high, factor = config.low_freq_factor, config.high_freq_factor, config.factor or 1.0
    wavelength = 2 * math.pi / base.astype(np.float64)
    blend = (original / wavelength - low) / (high - low)
    mixed = (1 - blend) * base / factor + blend * base
    scaled = np.where(wavelength > original / low, base / factor, mixed)
    return _single(np.where(wavelength < original / high, base, scaled))


def _yarn(config: RopeConfig, base: np.ndarray, head_dim: int, max_length: int) -> tuple[np.ndarray, float]:
    """Per-dimension blend of interpolation and extrapolation (arXiv 2309.00071)."""
    original = config.original_max_length or max_length
    factor = max_length / original if config.factor is None else config.factor

    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return _single(base / factor * ramp + base * (1 - ramp)), _yarn_scaling(config, factor)


def _yarn_scaling(config: RopeConfig, factor: float) -> float:
    def growth(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return growth(config.mscale) / growth(config.mscale_all_dim)
    return growth(1.0)


def _longrope(config: RopeConfig, head_dim: int, max_length: int, length: int) -> tuple[np.ndarray, float]:
    """One list of divisors up to the original length, another beyond it (arXiv 2402.13753)."""
    original = config.original_max_length or max_length
    divisors = np.asarray(config.long_factor if length > original else config.short_factor, np.float64)
    factor = max_length / original if config.factor is None else config.factor
    scaling = config.attention_factor
    if scaling is None:
        scaling = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    return _single(1.0 / (divisors * config.theta**exponents)), scaling
