"""Relative position buckets against their definition in exact fractions, and the bias against plain indexing."""

from __future__ import annotations

import decimal
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.ops.pointwise import dropout, split_keys
from jaxllm.ops.positions import relative_bias, relative_bias_at, relative_bucket


def by_definition(distance: int, *, buckets: int, max_distance: int, bidirectional: bool) -> int:
    """Mesh TensorFlow's rule with the logarithm to 60 digits, nudged up by 1e-40 so that exact powers are reached."""
    if bidirectional:
        buckets //= 2
        offset, n = (buckets if distance > 0 else 0), abs(distance)
    else:
        offset, n = 0, max(-distance, 0)
    exact = buckets // 2
    if n < exact:
        return offset + n
    with decimal.localcontext(prec=60):
        ratio = (decimal.Decimal(n) / exact).ln() / (decimal.Decimal(max_distance) / exact).ln()
        return offset + min(buckets - 1, exact + int(ratio * (buckets - exact) + decimal.Decimal("1e-40")))


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 65), st.integers(1, 400), st.booleans(), st.integers(-2000, 2000))
def test_buckets_by_definition(buckets: int, beyond: int, bidirectional: bool, start: int) -> None:
    rule = {"buckets": buckets, "max_distance": buckets // 2 + beyond, "bidirectional": bidirectional}
    distance = np.concatenate([np.arange(-40, 41), np.arange(start, start + 20)])
    found = relative_bucket(distance, **rule)
    assert found.tolist() == [by_definition(int(d), **rule) for d in distance]


def test_buckets_of_t5() -> None:
    """Recorded from transformers' T5Attention, 32 buckets up to 128."""
    distance = np.array([-1000, -128, -91, -90, -64, -16, -12, -11, -8, -7, -1, 0, 1, 7, 8, 12, 90, 91, 1000])
    both = relative_bucket(distance, buckets=32, max_distance=128, bidirectional=True)
    assert both.tolist() == [15, 15, 15, 14, 14, 10, 9, 8, 8, 7, 1, 0, 17, 23, 24, 25, 30, 31, 31]
    past = relative_bucket(distance, buckets=32, max_distance=128, bidirectional=False)
    assert past.tolist() == [31, 31, 29, 29, 26, 16, 12, 11, 8, 7, 1, 0, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 5), (5, 1), (6, 6), (9, 4)])
def test_bias_and_gradient_are_those_of_indexing(queries: int, keys: int) -> None:
    rng = np.random.default_rng(0)
    table = rng.standard_normal((8, 3)).astype(np.float32)
    slope = rng.standard_normal((1, 3, queries, keys)).astype(np.float32)
    run = functools.partial(relative_bias, queries=queries, keys=keys, max_distance=5, bidirectional=True)
    bias, pull = jax.vjp(run, jnp.asarray(table))
    distance = np.arange(keys)[None] - np.arange(queries)[:, None]
    bucket = relative_bucket(distance, buckets=8, max_distance=5, bidirectional=True)
    np.testing.assert_array_equal(bias, table[bucket].transpose(2, 0, 1)[None])
    want = np.zeros_like(table)
    np.add.at(want, bucket, slope[0].transpose(1, 2, 0))
    np.testing.assert_allclose(pull(jnp.asarray(slope))[0], want, rtol=1e-5, atol=1e-5)


def test_gradient_is_no_scatter() -> None:
    run = functools.partial(relative_bias, queries=64, keys=64, max_distance=128, bidirectional=False)
    text = str(jax.make_jaxpr(jax.grad(lambda t: jnp.sum(run(t) ** 2)))(jnp.zeros((32, 4))))
    assert "scatter" not in text and text.count("= gather") == 1  # the forward pass's slices


def test_bias_at_positions_is_the_rows_of_the_whole() -> None:
    table = jnp.asarray(np.random.default_rng(1).standard_normal((32, 4)), jnp.float32)
    whole = relative_bias(table, queries=9, keys=9, max_distance=20, bidirectional=False)
    queries, keys = jnp.array([[3, 8], [0, 5]]), jnp.array([[0, 1, 2, 3, -1], [8, 7, 0, 5, 3]])
    found = relative_bias_at(table, queries, keys, max_distance=20, capacity=9)
    for row in range(2):
        for i, query in enumerate(queries[row].tolist()):
            for j, key in enumerate(keys[row].tolist()):
                if 0 <= key <= query:
                    np.testing.assert_array_equal(found[row, :, i, j], whole[0, :, query, key])


def test_dropout_keeps_the_mean_and_needs_a_key() -> None:
    x = jnp.full((200, 500), 3.0, jnp.bfloat16)
    assert dropout(x, None, rate=0.3) is x
    found = dropout(x, jax.random.key(0), rate=0.3)
    assert found.dtype == x.dtype
    kept = np.asarray(found, np.float32)
    assert set(np.unique(kept)) == {0.0, float(jnp.bfloat16(3.0 / 0.7))}
    assert abs((kept == 0).mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / x.size)
    assert split_keys(None, 2) == (None, None)
    first, second = split_keys(jax.random.key(0), 2)
    assert first is not None and second is not None
    assert not np.array_equal(jax.random.key_data(first), jax.random.key_data(second))
