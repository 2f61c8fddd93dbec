"""A vector next to every row: the value is numpy's, the gradient is summed in float32 and rounded once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.pointwise import rms_norm, rows_of

ROWS = 5000


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_gradient_of_many_rows_is_rounded_once(dtype: str) -> None:
    like = jnp.zeros((2, ROWS // 2, 3), dtype)
    vector = jnp.array([1.0, -2.0, 0.5], dtype)
    grads = jnp.tile(jnp.array([1.0, 0.25, 2.0**-10], dtype), (2, ROWS // 2, 1))
    value, pull = jax.vjp(lambda v: rows_of(v, like), vector)
    np.testing.assert_array_equal(value, np.broadcast_to(np.asarray(vector), like.shape))
    want = (ROWS * np.array([1.0, 0.25, 2.0**-10])).astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(pull(grads)[0], want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_norms_weight_gradient_has_no_low_precision_sum(dtype: str) -> None:
    x, weight = jnp.ones((4, 64, 8), dtype), jnp.ones(8, dtype)
    jaxpr = jax.make_jaxpr(jax.grad(lambda w: jnp.sum(rms_norm(x, w, eps=1e-6).astype(jnp.float32))))(weight)
    sums = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "reduce_sum"]
    assert sums and all(eqn.invars[0].aval.dtype == jnp.float32 for eqn in sums)
