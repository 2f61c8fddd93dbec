"""A bias joins the accumulator: one rounding, and the gradients of plain autodiff."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops import backend
from jaxllm.ops.linear import biased_linear, linear
from tests.conftest import TOLERANCE


def inputs(dtype: str) -> list[jax.Array]:
    shapes = ((3, 5, 64), (64, 7), (7,))
    return [jax.random.normal(jax.random.key(i), shape).astype(dtype) for i, shape in enumerate(shapes)]


def test_the_sum_is_rounded_once() -> None:
    x, kernel, bias = inputs("bfloat16")
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64) + np.asarray(bias, np.float64)
    found = np.asarray(jax.jit(biased_linear)(x, kernel, bias), np.float64)
    half_ulp = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 8)
    assert np.all(np.abs(found - exact) <= 1.01 * half_ulp)


def test_gradients_are_those_of_autodiff() -> None:
    def slopes(function):
        return jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(function(*a))), argnums=(0, 1, 2)))(*inputs("float32"))

    for ours, want in zip(slopes(biased_linear), slopes(lambda x, k, b: x @ k + b), strict=True):
        np.testing.assert_allclose(ours, want, atol=TOLERANCE["float32"] * np.abs(np.asarray(want)).max())


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_matrix_s_gradient_is_summed_in_float32_and_rounded_once(
    dtype: str, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "on_gpu", lambda: gpu)
    x, grad = (jax.random.normal(jax.random.key(i), (4, 200, 24)).astype(dtype) for i in range(2))
    (found,) = jax.vjp(lambda kernel: linear(x, kernel), jnp.zeros((24, 24), dtype))[1](grad)
    exact = np.einsum("bnd,bnf->df", np.asarray(x, np.float64), np.asarray(grad, np.float64))
    assert found.dtype == dtype
    half_ulp = 2.0 ** (np.floor(np.log2(np.abs(exact))) - jnp.finfo(dtype).nmant - 1)
    assert np.all(np.abs(np.asarray(found, np.float64) - exact) <= 1.02 * half_ulp + 1e-4)
