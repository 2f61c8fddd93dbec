"""RoPE: each kind against its formula in float64, exact angles at long positions, and the rule for lengths."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import RopeConfig
from jaxllm.ops.positions import apply_rope, rope_cos_sin, rope_frequencies

DIM, LONGEST, TRAINED = 64, 131072, 8192
FACTORS = tuple(1 + 0.1 * i for i in range(DIM // 2))
KINDS = {
    "default": RopeConfig(theta=500000.0),
    "linear": RopeConfig(type="linear", factor=8.0),
    "dynamic": RopeConfig(type="dynamic", factor=4.0),
    "llama3": RopeConfig(type="llama3", theta=500000.0, factor=32.0, original_max_length=TRAINED),
    "yarn": RopeConfig(type="yarn", factor=16.0, original_max_length=TRAINED),
    "yarn_mscale": RopeConfig(type="yarn", factor=16.0, original_max_length=TRAINED, mscale=0.7, mscale_all_dim=0.9),
    "yarn_whole": RopeConfig(type="yarn", original_max_length=TRAINED, truncate=False, attention_factor=1.25),
    "longrope": RopeConfig(
        type="longrope", short_factor=FACTORS, long_factor=FACTORS[::-1], original_max_length=TRAINED
    ),
}


def ramp(x: float, low: float, high: float) -> float:
    return min(max((x - low) / (high - low), 0.0), 1.0)


def frequency(config: RopeConfig, i: int, length: int) -> float:
    """The definition of one dimension in float64, written independently of the library."""
    plain = config.theta ** (-2 * i / DIM)
    original = config.original_max_length or LONGEST
    factor = config.factor or LONGEST / original
    if config.type == "linear":
        return plain / factor
    if config.type == "dynamic":
        stretch = factor * max(length, LONGEST) / LONGEST - (factor - 1)
        return (config.theta * stretch ** (DIM / (DIM - 2))) ** (-2 * i / DIM)
    if config.type == "llama3":
        share = ramp(original * plain / (2 * math.pi), config.low_freq_factor, config.high_freq_factor)
        return (1 - share) * plain / factor + share * plain
    if config.type == "yarn":
        turns = (config.beta_fast, config.beta_slow)
        ends = [DIM * math.log(original / (2 * math.pi * r)) / (2 * math.log(config.theta)) for r in turns]
        low, high = (math.floor(ends[0]), math.ceil(ends[1])) if config.truncate else ends
        share = ramp(i, max(low, 0), min(high, DIM - 1))
        return share * plain / factor + (1 - share) * plain
    if config.type == "longrope":
        return plain / (config.long_factor if length > original else config.short_factor)[i]
    return plain


def attention_scale(config: RopeConfig) -> float:
    original = config.original_max_length or LONGEST
    stretch = math.log(config.factor or LONGEST / original)
    if config.attention_factor is not None:
        return config.attention_factor
    if config.type == "yarn":
        over = 0.1 * config.mscale_all_dim * stretch + 1 if config.mscale_all_dim else 1.0
        return (0.1 * (config.mscale or 1.0) * stretch + 1) / over
    if config.type == "longrope":
        return math.sqrt(1 + stretch / math.log(original))
    return 1.0


@pytest.mark.parametrize("length", [100, TRAINED, TRAINED + 1, LONGEST, 3 * LONGEST])
@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_follow_the_formula(kind: str, length: int) -> None:
    found, scale = rope_frequencies(KINDS[kind], head_dim=DIM, max_length=LONGEST, length=length)
    want = [frequency(KINDS[kind], i, length) for i in range(DIM // 2)]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, want, rtol=1e-6)
    assert scale == pytest.approx(attention_scale(KINDS[kind]), rel=1e-12)


def test_only_dynamic_and_longrope_look_at_the_length() -> None:
    for kind, config in KINDS.items():
        at = [
            rope_frequencies(config, head_dim=DIM, max_length=LONGEST, length=n)[0] for n in (1, LONGEST, 2 * LONGEST)
        ]
        assert np.array_equal(at[0], at[1]) == (kind != "longrope")
        assert np.array_equal(at[1], at[2]) == (kind != "dynamic")
        none = rope_frequencies(config, head_dim=DIM, max_length=LONGEST)[0]
        np.testing.assert_array_equal(none, at[1])


@pytest.mark.parametrize("kind", KINDS)
def test_angles_are_exact_at_the_longest_position(kind: str) -> None:
    positions = jnp.array([[0, 1, 4097, 65537, LONGEST - 1]])
    frequencies, scale = rope_frequencies(KINDS[kind], head_dim=DIM, max_length=LONGEST)
    cos, sin = jax.jit(lambda p: rope_cos_sin(p, frequencies, scale))(positions)
    assert cos.dtype == sin.dtype == jnp.float32
    angles = (np.asarray(positions)[..., None].astype(np.float32) * frequencies).astype(np.float64)
    np.testing.assert_allclose(cos, np.cos(angles) * scale, atol=2e-7)
    np.testing.assert_allclose(sin, np.sin(angles) * scale, atol=2e-7)


def test_low_precision_heads_get_rounded_angles_not_rounded_positions() -> None:
    """The rotation of a bfloat16 head at a long position is within bfloat16 of the exact one."""
    frequencies, scale = rope_frequencies(KINDS["default"], head_dim=DIM, max_length=LONGEST)
    cos, sin = rope_cos_sin(jnp.array([[LONGEST - 1, 77777]]), frequencies, scale)
    x = jax.random.normal(jax.random.key(0), (1, 2, 3, DIM), jnp.bfloat16)
    turned = jax.jit(apply_rope)(x, cos, sin)
    assert turned.dtype == jnp.bfloat16
    exact = np.asarray(jax.jit(apply_rope)(x.astype(jnp.float32), cos, sin))
    assert np.abs(np.asarray(turned, np.float32) - exact).max() < 2**-6 * np.abs(exact).max()


def test_rotation_keeps_norms_and_sees_only_differences() -> None:
    frequencies, scale = rope_frequencies(RopeConfig(), head_dim=DIM, max_length=2048)
    query, key = (jax.random.normal(jax.random.key(i), (1, 1, 1, DIM)) for i in (1, 2))

    @jax.jit
    def turn(x: jax.Array, at: int) -> jax.Array:
        return apply_rope(x, *rope_cos_sin(jnp.full((1, 1), at), frequencies, scale))

    def score(m: int, n: int) -> float:
        turned = np.asarray(turn(query, m)), np.asarray(turn(key, n))
        np.testing.assert_allclose(np.linalg.norm(turned[0]), np.linalg.norm(query), rtol=1e-6)
        return float(np.sum(turned[0] * turned[1]))

    np.testing.assert_allclose(score(900, 893), score(7, 0), rtol=1e-4)
    assert abs(score(900, 893) - score(900, 892)) > 1e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_both_passes_round_once(dtype: str) -> None:
    """A gradient is the sum of two products, which autodiff would round one by one."""
    x = jax.random.normal(jax.random.key(0), (2, 50, 3, 32)).astype(dtype)
    frequencies, scaling = rope_frequencies(RopeConfig(), head_dim=32, max_length=64)
    cos, sin = rope_cos_sin(jnp.arange(100_000, 100_050)[None], frequencies, scaling)

    def both(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, pull = jax.vjp(lambda x: apply_rope(x, cos, sin), x)
        return value, *pull(jnp.flip(x))

    for found, want in zip(both(x), both(x.astype(jnp.float32)), strict=True):
        off = np.mean(np.asarray(found != want.astype(dtype)))
        assert off < 2e-3, off  # a sum in float32 may fall on the other side of a tie


def test_pairs_are_halves_not_neighbours() -> None:
    """A quarter turn of the first pair moves component 0 to component H/2."""
    x = jnp.zeros((1, 1, 1, 8)).at[..., 0].set(1.0)
    quarter = jnp.array([[[1.0, 0, 0, 0]]])
    turned = apply_rope(x, 1 - quarter, quarter)
    np.testing.assert_array_equal(np.flatnonzero(turned), [4])


def test_unknown_kinds_raise() -> None:
    with pytest.raises(ValueError, match=r"RopeConfig\.type must be one of default, linear"):
        RopeConfig(type="proportional")
    config = RopeConfig()
    object.__setattr__(config, "type", "axial")
    with pytest.raises(ValueError, match="rope type 'axial' is unknown"):
        rope_frequencies(config, head_dim=8, max_length=8)
