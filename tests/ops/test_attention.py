"""Attention: every path equals the definition, masks hide what they must, and nothing is NaN."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.attention import Pattern, attention, masked_attention
from jaxllm.ops.linear import einsum, linear
from tests.conftest import TOLERANCE


def operands(length: int, keys: int, *, dtype=jnp.float32, heads: int = 6, kv_heads: int = 3) -> list[jax.Array]:
    shapes = [(2, length, heads, 8), (2, keys, kv_heads, 8), (2, keys, kv_heads, 8)]
    return [jax.random.normal(jax.random.key(i), shape).astype(dtype) for i, shape in enumerate(shapes)]


def numpy_attention(query, key, value, mask, scale):
    """The definition, with repeated heads, in float64."""
    groups = query.shape[2] // key.shape[2]
    key, value = np.repeat(key, groups, axis=2), np.repeat(value, groups, axis=2)
    scores = np.einsum("btnh,bsnh->bnts", query, key) * scale
    scores = np.where(mask[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(axis=-1, keepdims=True), value)


SEGMENTS = jnp.array([[1] * 100 + [2] * 120 + [3] * 80 + [0] * 20, [1] * 320])
PATTERNS = {
    "all": Pattern(),
    "causal": Pattern(causal=True),
    "window": Pattern(causal=True, window=50),
    "packed": Pattern(causal=True, query_segments=SEGMENTS, key_segments=SEGMENTS),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_reference_is_the_definition(name: str) -> None:
    pattern, length = PATTERNS[name], 320
    q, k, v = operands(length, length)
    index = jnp.arange(length)
    mask = pattern.mask(index, index)
    mask = np.ones((2, length, length), bool) if mask is None else np.broadcast_to(mask, (2, length, length))
    ours = attention(q, k, v, pattern=pattern, scale=0.3, implementation="reference")
    seen = mask.any(axis=-1)
    want = numpy_attention(*(np.asarray(x, np.float64) for x in (q, k, v)), mask | ~seen[..., None], 0.3)
    np.testing.assert_allclose(np.asarray(ours)[seen], want[seen], atol=TOLERANCE["float32"])
    assert np.all(np.asarray(ours)[~seen] == 0)


@pytest.mark.parametrize("length", [320, 257])
@pytest.mark.parametrize("name", ["all", "causal", "window"])
def test_chunked_equals_reference_with_gradients_and_bias(name: str, length: int) -> None:
    q, k, v = operands(length, length)
    bias = jax.random.normal(jax.random.key(9), (1, 6, length, length))

    def total(implementation: str):
        def loss(*args):
            out = attention(*args[:3], pattern=PATTERNS[name], scale=0.3, bias=args[3], implementation=implementation)
            return jnp.sum(jnp.sin(out))

        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(q, k, v, bias)

    for ours, want in zip(jax.tree.leaves(total("chunked")), jax.tree.leaves(total("reference")), strict=True):
        np.testing.assert_allclose(ours, want, atol=TOLERANCE["float32_grad"], rtol=TOLERANCE["float32_grad"])


def test_packed_chunked_equals_reference() -> None:
    q, k, v = operands(320, 320)
    outputs = [
        attention(q, k, v, pattern=PATTERNS["packed"], scale=0.3, implementation=name)
        for name in ("chunked", "reference")
    ]
    np.testing.assert_allclose(*outputs, atol=TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_fully_masked_rows_are_zero_and_leak_nothing(dtype: str) -> None:
    q, k, v = operands(5, 5, dtype=dtype)
    mask = jnp.zeros((2, 5, 5), bool).at[:, 3:].set(True)

    def loss(q, k, v):
        return jnp.sum(masked_attention(q, k, v, mask=mask, scale=1.0).astype(jnp.float32) ** 2)

    out = masked_attention(q, k, v, mask=mask, scale=1.0)
    assert np.all(np.asarray(out[:, :3], np.float32) == 0)
    for grad in jax.grad(loss, argnums=(0, 1, 2))(q, k, v):
        assert np.all(np.isfinite(np.asarray(grad, np.float32)))


def test_grouped_heads_are_neighbours_not_tiles() -> None:
    q, k, v = operands(4, 4)
    ours = masked_attention(q, k, v, mask=None, scale=1.0)
    tiled = masked_attention(q, jnp.tile(k, (1, 1, 2, 1)), jnp.tile(v, (1, 1, 2, 1)), mask=None, scale=1.0)
    repeated = masked_attention(q, jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2), mask=None, scale=1.0)
    np.testing.assert_allclose(ours, repeated, atol=TOLERANCE["float32"])
    assert np.abs(np.asarray(ours - tiled)).max() > 0.1


def test_cudnn_refuses_by_name_where_it_cannot_run() -> None:
    q, k, v = operands(8, 8)
    with pytest.raises(ValueError, match="cuDNN needs float16 or bfloat16, got float32"):
        attention(q, k, v, pattern=Pattern(), scale=1.0, implementation="cudnn")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_products_accumulate_in_float32(dtype: str) -> None:
    x = jax.random.normal(jax.random.key(0), (7, 512)).astype(dtype)
    w = jax.random.normal(jax.random.key(1), (512, 9)).astype(dtype)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    rounded = np.asarray(jnp.asarray(exact, jnp.float32).astype(dtype), np.float32)
    np.testing.assert_allclose(np.asarray(linear(x, w), np.float32), rounded, rtol=TOLERANCE[dtype])
    graph = str(jax.make_jaxpr(jax.grad(lambda a, b: jnp.sum(linear(a, b).astype(jnp.float32)), argnums=(0, 1)))(x, w))
    assert graph.count("dot_general") == graph.count("preferred_element_type=float32") == 3


def test_einsum_gradient_equals_autodiff() -> None:
    a = jax.random.normal(jax.random.key(0), (2, 3, 4, 5)).astype(jnp.bfloat16)
    b = jax.random.normal(jax.random.key(1), (2, 6, 4, 5)).astype(jnp.bfloat16)

    def grads(function):
        def loss(x, y):
            return jnp.sum(jnp.sin(function("btkh,bskh->bkts", x, y).astype(jnp.float32)))

        return jax.grad(loss, argnums=(0, 1))(a, b)

    for ours, want in zip(grads(einsum), grads(jnp.einsum), strict=True):
        np.testing.assert_allclose(
            np.asarray(ours, np.float32), np.asarray(want, np.float32), atol=0.1, rtol=TOLERANCE["bfloat16"]
        )
