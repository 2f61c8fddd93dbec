"""Dropout keeps the mean: its factor is exact in every dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.pointwise import dropout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rate", [0.1, 0.05, 0.3])
def test_what_is_kept_is_divided_by_the_exact_rate(rate: float, dtype: str) -> None:
    x = jnp.linspace(1, 2, 2**14).astype(dtype)
    value, pull = jax.vjp(lambda x: dropout(x, jax.random.key(0), rate=rate), x)
    for found in (value, *pull(x)):
        kept = np.asarray(found) != 0
        factors = np.asarray(found, np.float64)[kept] / np.asarray(x, np.float64)[kept]
        np.testing.assert_allclose(factors.mean(), 1 / (1 - rate), rtol=2e-4)
