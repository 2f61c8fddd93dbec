"""Rotary position embedding (arXiv 2104.09864) and its extensions to longer contexts.

Frequencies are NumPy float32, made at trace time by the steps of transformers/modeling_rope_utils.py: at position
131071 one unit in the last place is a hundredth of a radian. Angles, cosines and sines are always float32. Heads are
rotated in halves (pairs i, i + H/2), the layout of Hugging Face files.

Dynamic and longrope depend on the length of the context, here one static number for a whole generation. Cached keys and
new queries then share one set of frequencies, and a result does not depend on earlier calls. transformers takes the
largest position of each call, and its cached keys keep the frequencies of an earlier call. Compare the two on whole
sequences only.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxllm.config import RopeConfig


def rope_frequencies(
    config: RopeConfig, *, head_dim: int, max_length: int, length: int | None = None
) -> tuple[np.ndarray, float]:
    """Inverse frequencies float32 [head_dim / 2] and the factor on cos and sin.

    `max_length` is the model's context length. A use may reach positions 0..`length`-1, which dynamic and longrope
    depend on; None is `max_length`.

    >>> rope_frequencies(RopeConfig(theta=100.0), head_dim=4, max_length=8)
    (array([1. , 0.1], dtype=float32), 1.0)
    """
    length = max_length if length is None else length
    periods = _periods(config.theta, head_dim)
    if config.type == "default":
        return _one / periods, 1.0
    if config.type == "linear":
        return _one / periods / np.float32(config.factor), 1.0
    if config.type == "dynamic":
        return _one / _periods(_grown_base(config, head_dim, max_length, length), head_dim), 1.0
    if config.type == "llama3":
        return _llama3(config, _one / periods, max_length), 1.0
    if config.type == "yarn":
        return _yarn(config, periods, max_length)
    if config.type == "longrope":
        return _longrope(config, periods, max_length, length)
    raise ValueError(f"rope type {config.type!r} is unknown")


def rope_cos_sin(
    positions: Int[Array, "B T"], frequencies: Float[np.ndarray, " P"], scaling: float
) -> tuple[Float[Array, "B T P"], Float[Array, "B T P"]]:
    """Float32 cosines and sines of position * frequency, times `scaling`."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles) * scaling, jnp.sin(angles) * scaling


def apply_rope(
    x: Float[Array, "B T N H"], cos: Float[Array, "#B T P"], sin: Float[Array, "#B T P"]
) -> Float[Array, "B T N H"]:
    """Rotates the pairs (i, i + H/2) of each head in float32, in the dtype of x.

    transformers rounds cos, sin and all their products to x's dtype: five roundings instead of one.
    """
    cos, sin = cos[:, :, None], sin[:, :, None]
    # Widened before it is used twice, so that the backward pass rounds a sum and not its terms.
    first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, cos.dtype)), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


_one = np.float32(1)


def _periods(theta: float, head_dim: int) -> np.ndarray:
    """Theta ** (2i / H), rounded from float64; transformers' differs at most in the last bit."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)


def _grown_base(config: RopeConfig, head_dim: int, max_length: int, length: int) -> float:
    """Base grown with the length beyond max_length (NTK-aware, reddit u/emozilla)."""
    assert config.factor is not None
    growth = config.factor * max(length, max_length) / max_length - (config.factor - 1)
    return config.theta * growth ** (head_dim / (head_dim - 2))


def _llama3(config: RopeConfig, inverse: np.ndarray, max_length: int) -> np.ndarray:
    """Long waves divided by factor, short ones kept, a linear blend between (arXiv 2407.21783)."""
    original = np.float32(config.original_max_length or max_length)
    low, high, factor = (np.float32(x) for x in (config.low_freq_factor, config.high_freq_factor, config.factor))
    wavelength = np.float32(2 * math.pi) / inverse
    blend = (original / wavelength - low) / (high - low)
    mixed = (_one - blend) * inverse / factor + blend * inverse
    scaled = np.where(wavelength > original / low, inverse / factor, mixed)
    return np.where(wavelength < original / high, inverse, scaled)


def _yarn(config: RopeConfig, periods: np.ndarray, max_length: int) -> tuple[np.ndarray, float]:
    """Per-dimension blend of interpolation and extrapolation (arXiv 2309.00071)."""
    head_dim = 2 * len(periods)
    original = config.original_max_length or max_length
    factor = max_length / original if config.factor is None else config.factor

    def dimension(rotations: float) -> float:
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = _one - np.clip(ramp, 0, 1)
    inverse = _one / (np.float32(factor) * periods) * (_one - kept) + _one / periods * kept
    return inverse, _yarn_scaling(config, factor)


def _yarn_scaling(config: RopeConfig, factor: float) -> float:
    def growth(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return growth(config.mscale) / growth(config.mscale_all_dim)
    return growth(1.0)


def _longrope(config: RopeConfig, periods: np.ndarray, max_length: int, length: int) -> tuple[np.ndarray, float]:
    """One list of divisors up to the original length, another beyond it (arXiv 2402.13753)."""
    original = config.original_max_length or max_length
    divisors = np.asarray(config.long_factor if length > original else config.short_factor, np.float32)
    factor = max_length / original if config.factor is None else config.factor
    scaling = config.attention_factor
    if scaling is None:
        scaling = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return _one / (divisors * periods), scaling
