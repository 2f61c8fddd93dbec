"""Positions of tokens: rotary embedding (arXiv 2104.09864) in queries and keys, or T5's relative bias of their scores.

Rotary frequencies, also those of extensions to longer contexts, are NumPy float32, made at trace time by the steps of
transformers/modeling_rope_utils.py: at position 131071 one unit in the last place is a hundredth of a radian. Angles,
cosines and sines are always float32. Heads are rotated in halves (pairs i, i + H/2), the layout of Hugging Face files.

Dynamic and longrope depend on the length of the context, here one static number for a whole generation. Cached keys and
new queries then share one set of frequencies, and a result does not depend on earlier calls. transformers takes the
largest position of each call, and its cached keys keep the frequencies of an earlier call. Compare the two on whole
sequences only.

T5's relative bias is one learned number per head and bucket of distances (arXiv 1910.10683 section 2.1). Buckets are
computed on the host, in integers: the logarithm of T5's rule may put a border one distance off on another platform. A
bias depends on the distance alone. So the table is multiplied by one-hot rows of the T + S distances around zero, and
row t of [N, T, S] is a slice of the result. The gradient is a sum and a small matmul, not a scatter of T * S terms. Out
of scope: attention, which adds the bias to its scores.
"""

import bisect
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxllm.config import RopeConfig
from jaxllm.ops import backend
from jaxllm.ops.linear import custom_vjp


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


def relative_bucket(distance: np.ndarray, *, buckets: int, max_distance: int, bidirectional: bool) -> np.ndarray:
    """The bucket of each distance (key index minus query index).

    With `bidirectional`, half of the buckets are for keys after the query; else those share bucket 0. A direction has b
    buckets. The first m = b // 2 hold one distance each. Bucket m + j starts at the first n with
    n >= m * (max_distance / m) ** (j / (b - m)).
    """
    if bidirectional:
        buckets //= 2
        offset, n = np.where(distance > 0, buckets, 0), np.abs(distance)
    else:
        offset, n = np.zeros_like(distance), np.maximum(-distance, 0)
    starts = np.array(_bucket_starts(buckets, max_distance))
    return (offset + np.searchsorted(starts, n, side="right") - 1).astype(np.int32)


@functools.cache
def _bucket_starts(buckets: int, max_distance: int) -> tuple[int, ...]:
    """First distance of each bucket of one direction, by the rule without logarithm or root."""
    exact = buckets // 2
    wide = buckets - exact

    def first(j: int) -> int:
        # The smallest n with n^wide >= exact^wide * (max_distance / exact)^j, both sides times exact^j.
        bound, distances = exact**wide * max_distance**j, range(exact, max_distance)
        return exact + bisect.bisect_left(distances, bound, key=lambda n: n**wide * exact**j)

    return (*range(exact), *(first(j) for j in range(wide)))


def relative_bias(
    table: Float[Array, "R N"], *, queries: int, keys: int, max_distance: int, bidirectional: bool, dtype: Any = None
) -> Float[Array, "1 N T S"]:
    """The bias of every query and key of two sequences that share their first index, in float32 or `dtype`."""
    distance = np.arange(-queries, keys)
    bucket = relative_bucket(distance, buckets=table.shape[0], max_distance=max_distance, bidirectional=bidirectional)
    numbers = _rows(table, bucket).T
    bias: Any = _lay_out(numbers if dtype is None else numbers.astype(dtype), queries, keys)
    return bias[None]


@functools.partial(custom_vjp, nondiff_argnums=(1, 2))
def _lay_out(numbers: Float[Array, "N W"], queries: int, keys: int) -> Float[Array, "N T S"]:
    """Row t is the S of W numbers (distances -T .. S - 1) from -t on."""
    # Slices are written once; XLA:CPU would fuse reshapes into the softmax of every layer.
    # Figure: 1.04 times the processor time without, for two layers' softmax.
    # Seen: jaxlib 0.10.2. Shown by: row `slices of a bias`.
    heads, width = numbers.shape
    starts = width * jnp.arange(heads)[:, None] + queries - jnp.arange(queries)
    row = functools.partial(jax.lax.dynamic_slice_in_dim, numbers.reshape(-1), slice_size=keys)
    return jax.vmap(jax.vmap(row))(starts)


def _lay_out_backward(queries: int, keys: int, saved: None, grad: Array) -> tuple[Array]:
    # Row T - 1 - t holds distance d in column d + t: rows of W, read again as rows of W - 1, move by one place each.
    heads, width = grad.shape[0], queries + keys
    flat = jnp.pad(grad[:, ::-1], ((0, 0), (0, 0), (0, queries))).reshape(heads, -1)
    columns = flat[:, : queries * (width - 1)].reshape(heads, queries, width - 1)
    total = backend.sum_by_matmul(columns, axis=1)
    return (jnp.pad(total, ((0, 0), (1, 0))).astype(grad.dtype),)


_lay_out.defvjp(lambda numbers, queries, keys: (_lay_out(numbers, queries, keys), None), _lay_out_backward)


def relative_bias_at(
    table: Float[Array, "R N"], queries: Int[Array, "B T"], keys: Int[Array, "B S"], *, max_distance: int, capacity: int
) -> Float[Array, "B N T S"]:
    """The causal bias between given positions below `capacity`, in float32, for decoding from a cache.

    Keys after the query and empty slots get meaningless numbers. The caller masks them.
    """
    bucket = relative_bucket(
        -np.arange(capacity), buckets=table.shape[0], max_distance=max_distance, bidirectional=False
    )
    by_distance = _rows(table, bucket)  # [capacity, N]
    distance = jnp.clip(queries[:, :, None] - keys[:, None], 0, capacity - 1)
    return jnp.einsum("btsn->bnts", by_distance[distance])


def _rows(table: Float[Array, "R N"], bucket: np.ndarray) -> Float[Array, "W N"]:
    wide = jnp.promote_types(table.dtype, jnp.float32)
    hot = jnp.asarray(bucket[:, None] == np.arange(table.shape[0]), wide)
    return jnp.dot(hot, table.astype(wide), precision=jax.lax.Precision.HIGHEST)
