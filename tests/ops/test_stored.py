"""Matmuls of decoding equal x times the kernel, for each way to store a matrix and any number of rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.stored import Rows, project, stored


@pytest.mark.parametrize("rows", [(1,), (1, 1), (2, 1), (2, 3)])
@pytest.mark.parametrize("shape", [(6, 10), (7, 10), (10, 6), (800, 900), (512, 8192)])
def test_equals_the_plain_product(shape: tuple[int, int], rows: tuple[int, ...]) -> None:
    """Both ways round, an odd inner size that has no halves, and a matrix too large to be halved."""
    x, kernel = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(*rows, shape[0]), shape]))
    matrix = stored(kernel, dtype=jnp.float32, int8=False)
    assert isinstance(matrix, Rows) == (shape in {(10, 6), (800, 900)})
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    np.testing.assert_allclose(jax.jit(project)(x, matrix), exact, atol=1e-5 * shape[0] ** 0.5)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
def test_int8_equals_the_product_with_the_restored_kernel(shape: tuple[int, int], rows: int) -> None:
    x, kernel = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(rows, shape[0]), shape]))
    matrix = stored(kernel, dtype=jnp.float32, int8=True)
    restored = project(jnp.eye(shape[0]), matrix)  # many rows: the matrix itself
    np.testing.assert_allclose(restored, kernel, atol=float(jnp.abs(kernel).max()) / 127)
    np.testing.assert_allclose(project(x, matrix), x @ restored, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
def test_bfloat16_is_summed_in_float32_and_rounded_once(shape: tuple[int, int]) -> None:
    x, kernel = (jax.random.normal(jax.random.key(i), s, jnp.bfloat16) for i, s in enumerate([(1, shape[0]), shape]))
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    wide = project(x, stored(kernel, dtype=jnp.bfloat16, int8=False), dtype=jnp.float32)
    np.testing.assert_allclose(wide, exact, atol=1e-5)
