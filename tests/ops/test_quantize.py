"""Int8 storage: how far it may be off, and the numbers that it cannot hold."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.stored import quantize


def restored(x: jax.Array, axis: int) -> tuple[np.ndarray, np.ndarray]:
    values, scale = jax.jit(quantize, static_argnames="axis")(x, axis=axis)
    assert values.dtype == jnp.int8
    return np.asarray(values * jnp.expand_dims(scale, axis)), np.asarray(scale)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_the_error_is_at_most_half_a_scale_and_the_largest_is_exact(axis: int) -> None:
    x = jax.random.normal(jax.random.key(0), (40, 300)) * jnp.logspace(-3, 3, 300)
    found, scale = restored(x, axis)
    assert (np.abs(found - x) <= 0.5001 * np.expand_dims(scale, axis)).all()
    largest = np.abs(x).argmax(axis=axis, keepdims=True)
    np.testing.assert_allclose(
        np.take_along_axis(found, largest, axis), np.take_along_axis(np.asarray(x), largest, axis), rtol=1e-6
    )


@pytest.mark.parametrize("size", [4, 4096])
def test_zeros_stay_zeros_and_a_nan_is_told_by_its_own_channel_only(size: int) -> None:
    x = jnp.ones((3, size)).at[1].set(0).at[2, size // 2].set(jnp.nan)
    found, scale = restored(x, 1)
    np.testing.assert_allclose(scale, [1 / 127, 0, np.nan])
    np.testing.assert_allclose(found[0], 1, rtol=1e-6)
    np.testing.assert_array_equal(found[1], 0)
    assert np.isnan(found[2]).all()
