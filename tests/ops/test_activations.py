"""Activations in 16 bits: as exact as float32 rounded once, forward and backward, at any size of input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.pointwise import ACTIVATIONS


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["silu", "gelu_tanh", "gelu"])
def test_values_and_slopes_are_rounded_once(name: str, dtype: str) -> None:
    """In float16 the cube of GELU's tanh form and its slope leave the range at 41 and 148."""
    x = jnp.concatenate([jnp.linspace(-12, 12, 1001), jnp.array([-6e4, -300, -150, -41, 41, 150, 300, 6e4])])
    x = x.astype(dtype)
    function = ACTIVATIONS[name]

    def both(x: jax.Array) -> list[np.ndarray]:
        value, pull = jax.vjp(function, x)
        return [np.asarray(part, np.float64) for part in (value, *pull(jnp.ones_like(value)))]

    finfo = jnp.finfo(dtype)
    for found, want in zip(both(x), both(x.astype(jnp.float32)), strict=True):
        bound = 0.51 * np.maximum(float(finfo.eps) * np.abs(want), float(finfo.smallest_subnormal))
        np.testing.assert_array_less(np.abs(found - want), bound + 1e-30)
