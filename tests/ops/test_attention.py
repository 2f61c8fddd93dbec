"""Attention: every path equals the definition, masked pairs have no effect, and nothing is NaN."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.attention import attention, masked_attention
from jaxllm.ops.cudnn import append_codes, fused_attention, obstacle
from jaxllm.ops.linear import einsum, linear
from jaxllm.ops.masks import Pattern
from tests.conftest import TOLERANCE
from tests.structure.programs import pretend_gpu


def operands(
    length: int, keys: int, *, dtype=jnp.float32, heads: int = 6, kv_heads: int = 3, width: int = 8
) -> list[jax.Array]:
    shapes = [(2, length, heads, width), (2, keys, kv_heads, width), (2, keys, kv_heads, width)]
    return [jax.random.normal(jax.random.key(i), shape).astype(dtype) for i, shape in enumerate(shapes)]


def numpy_attention(query, key, value, mask, scale):
    """The definition, with repeated heads, in float64."""
    groups = query.shape[2] // key.shape[2]
    key, value = np.repeat(key, groups, axis=2), np.repeat(value, groups, axis=2)
    scores = np.einsum("btnh,bsnh->bnts", query, key) * scale
    scores = np.where(mask[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(axis=-1, keepdims=True), value)


def patterns(length: int) -> dict[str, Pattern]:
    segments = jnp.array([[1] * 100 + [2] * 120 + [3] * (length - 240) + [0] * 20, [1] * length])
    return {
        "all": Pattern(),
        "causal": Pattern(causal=True),
        "window": Pattern(causal=True, window=50),
        "packed": Pattern(causal=True, query_segments=segments, key_segments=segments),
    }


def padded_patterns(length: int) -> dict[str, Pattern]:
    lengths = jnp.array([length, 200])
    packed = patterns(length)["packed"]
    return {
        "padded": Pattern(query_lengths=lengths, key_lengths=lengths),
        "causal padded": Pattern(causal=True, query_lengths=lengths, key_lengths=lengths),
        "window padded": Pattern(causal=True, window=50, query_lengths=lengths, key_lengths=lengths),
        "padded keys": Pattern(key_lengths=lengths),
        "packed both ways": packed._replace(causal=False),
    }


PATTERNS = patterns(320)


def test_the_mask_of_a_block_is_a_block_of_the_mask() -> None:
    for pattern in PATTERNS.values():
        whole = pattern.mask(range(320), range(320))
        block = pattern.mask(range(64, 128), range(32, 128))
        assert (whole is None) == (block is None)
        if whole is not None and block is not None:
            whole = np.broadcast_to(whole, (*whole.shape[:-2], 320, 320))[..., 64:128, 32:128]
            np.testing.assert_array_equal(np.broadcast_to(block, whole.shape), whole)


@pytest.mark.parametrize("name", PATTERNS)
def test_reference_is_the_definition(name: str) -> None:
    pattern, length = PATTERNS[name], 320
    q, k, v = operands(length, length)
    mask = pattern.mask(range(length), range(length))
    mask = np.ones((2, length, length), bool) if mask is None else np.broadcast_to(mask, (2, length, length))
    ours = attention(q, k, v, pattern=pattern, scale=0.3, implementation="reference")
    seen = mask.any(axis=-1)
    want = numpy_attention(*(np.asarray(x, np.float64) for x in (q, k, v)), mask | ~seen[..., None], 0.3)
    np.testing.assert_allclose(np.asarray(ours)[seen], want[seen], atol=TOLERANCE["float32"])
    assert np.all(np.asarray(ours)[~seen] == 0)


PATTERNS |= padded_patterns(320)


def coded(query, key, value, *, pattern, scale, bias, implementation):
    """The cuDNN path's operands under jax's own definition."""
    del implementation
    return fused_attention(query, key, value, pattern=pattern, scale=scale, bias=bias, implementation="xla")


PATHS = {"reference": attention, "chunked": attention, "coded": coded, "cudnn": attention}
on_gpu = pytest.param("cudnn", marks=pytest.mark.gpu)


def output_and_gradients(path: str, name: str | Pattern, arguments: list[jax.Array], *, biased: bool):
    pattern = PATTERNS[name] if isinstance(name, str) else name

    def loss(*args):
        bias = args[3] if biased else None
        out = PATHS[path](*args[:3], pattern=pattern, scale=0.3, bias=bias, implementation=path)
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    grad = jax.jit(jax.grad(loss, argnums=tuple(range(len(arguments))), has_aux=True))
    with jax.default_matmul_precision("highest"):
        grads, out = grad(*arguments)
    return {"output": out, **dict(zip(("query", "key", "value", "bias"), grads, strict=False))}


@functools.cache
def reference(name: str, biased: bool, dtype: str, length: int, width: int):
    """Operands in `dtype`, and float32 results of the path `reference` on them."""
    arguments = operands(length, length, dtype=dtype, width=width)
    if biased:
        arguments.append(jax.random.normal(jax.random.key(9), (1, 6, length, length)).astype(dtype))
    exact = [x.astype(jnp.float32) for x in arguments]
    pattern = {**patterns(length), **padded_patterns(length)}[name]
    return pattern, arguments, output_and_gradients("reference", pattern, exact, biased=biased)


# On a GPU heads of 64, or 80 with codes, as models have; one length whose bias rows are not multiples of 16 bytes.
ODD = {"causal": 370}


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("path", ["chunked", "coded", on_gpu])
def test_every_path_equals_the_reference_with_gradients(path: str, name: str, biased: bool) -> None:
    dtype, length, width = ("bfloat16", ODD.get(name, 384), 64) if path == "cudnn" else ("float32", 320, 8)
    pattern, arguments, want = reference(name, biased, dtype, length, width)
    tolerance = TOLERANCE["bfloat16" if path == "cudnn" else "float32_grad"]
    for part, ours in output_and_gradients(path, pattern, arguments, biased=biased).items():
        scale = float(jnp.abs(want[part]).max())
        np.testing.assert_allclose(
            np.asarray(ours, np.float32) / scale, np.asarray(want[part]) / scale, atol=tolerance, err_msg=part
        )


@pytest.mark.parametrize("length", [320, 384])
@pytest.mark.parametrize("path", ["chunked", pytest.param("auto", marks=pytest.mark.gpu)])
def test_scores_that_are_all_strongly_negative_have_gradients(path: str, length: int) -> None:
    """Data of the class that cuDNN is not asked for: the exponential of minus a query's log-sum-exp is infinite."""
    query, key, value = operands(length, length, dtype="bfloat16", heads=2, kv_heads=2, width=64)
    query = (0.1 * query).at[..., 0].set(1.0)
    key = (0.1 * key).at[..., 0].set(-400.0)
    bias = jnp.zeros((1, 2, length, length), jnp.bfloat16)

    def loss(*args: jax.Array) -> jax.Array:
        *operands_, bias = args
        out = attention(*operands_, pattern=Pattern(), scale=0.3, bias=bias, implementation=path)
        return jnp.sum(jnp.sin(out.astype(jnp.float32)))

    for grad in jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(query, key, value, bias):
        assert np.isfinite(np.asarray(grad, np.float32)).all()


def test_lengths_may_be_mapped_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients row by row, lowered for a GPU, whose rules see lengths of queries that nobody gave."""
    pretend_gpu(monkeypatch)
    arguments = [x.astype(jnp.bfloat16)[:, None] for x in operands(64, 64)]

    def row(q: jax.Array, k: jax.Array, v: jax.Array, length: jax.Array) -> jax.Array:
        pattern = Pattern(key_lengths=length)
        return jnp.sum(jnp.sin(attention(q, k, v, pattern=pattern, scale=0.3).astype(jnp.float32)))

    mapped = jax.jit(jax.vmap(jax.grad(row), in_axes=0)).trace(*arguments, jnp.array([[64], [30]], jnp.int32))
    assert "fmha" in mapped.lower(lowering_platforms=("cuda",)).as_text()


def test_chunked_takes_any_length_and_keeps_no_weights_when_large(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = operands(257, 257)
    want = output_and_gradients("reference", "causal", arguments, biased=False)
    monkeypatch.setattr("jaxllm.ops.chunked_attention._KEPT_BYTES", 0)
    ours = output_and_gradients("chunked", "causal", arguments, biased=False)
    for part, value in want.items():
        np.testing.assert_allclose(ours[part], value, atol=TOLERANCE["float32_grad"], err_msg=part)
    kept = jax.make_jaxpr(lambda *args: jax.vjp(lambda *a: chunked_causal(*a), *args)[1])(*arguments)
    assert max(variable.aval.size for variable in kept.jaxpr.outvars) == max(x.size for x in arguments)


def gradients(path: str, slope: jax.Array, *arguments: jax.Array) -> list[np.ndarray]:
    def attend(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        pattern = PATTERNS["causal"]
        return attention(query, key, value, pattern=pattern, scale=0.3, bias=bias, implementation=path)

    grads = jax.jit(lambda *args: jax.vjp(attend, *args)[1](slope.astype(args[0].dtype)))(*arguments)
    return [np.asarray(grad, np.float64) for grad in grads]


def both_errors(slope: jax.Array, *arguments: jax.Array) -> list[tuple[float, float]]:
    """Errors of each gradient by `chunked` and by `reference`, relative to `reference` in float32."""
    exact = gradients("reference", slope, *(x.astype(jnp.float32) for x in arguments))
    paths = (gradients(path, slope, *arguments) for path in ("chunked", "reference"))
    ours, theirs = ([np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(p, exact, strict=True)] for p in paths)
    return list(zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kept", [2**28, 0], ids=["kept", "recomputed"])
def test_chunked_loses_no_small_gradients_in_float16(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient divided by a sum over hundreds of keys leaves float16's range, as in the path `reference`."""
    monkeypatch.setattr("jaxllm.ops.chunked_attention._KEPT_BYTES", kept)
    query, key, value = operands(512, 512, dtype=jnp.float16, heads=2, kv_heads=1)
    bias = jax.random.normal(jax.random.key(4), (1, 2, 512, 512)).astype(jnp.float16)
    slope = 2.0**-8 * jax.random.normal(jax.random.key(3), query.shape).astype(jnp.float16)
    arguments = [0.1 * query, key, value, bias]

    exact = gradients("reference", slope, *(x.astype(jnp.float32) for x in arguments))
    ours, theirs = gradients("chunked", slope, *arguments), gradients("reference", slope, *arguments)
    for name, one, other, want in zip(("query", "key", "value", "bias"), ours, theirs, exact, strict=True):
        late = (..., slice(256, None), slice(None)) if name == "bias" else (slice(None), slice(256, None))
        errors = [np.linalg.norm((x - want)[late]) / np.linalg.norm(want[late]) for x in (one, other)]
        assert errors[0] < max(errors[1], 5e-4), (name, errors)


def test_chunked_loses_no_small_queries_in_float16() -> None:
    """A query divided by a sum over a thousand keys would be below float16's normal numbers."""
    query, key, value = operands(1024, 1024, dtype=jnp.float16, heads=2, kv_heads=1)
    slope = 64 * jax.random.normal(jax.random.key(3), query.shape)
    for ours, theirs in both_errors(slope, 0.005 * query, key, value):
        assert ours < max(theirs, 5e-4), (ours, theirs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_chunked_gradients_are_exact_where_keys_and_values_have_much_in_common(dtype: str) -> None:
    """An error that all scores of a query share does not average out over such keys."""
    query, key, value = operands(512, 512, heads=2, kv_heads=1)
    key, value = key + 2 * key[:1, :1], value + 4 * value[:1, :1]
    slope = jax.random.normal(jax.random.key(3), query.shape)
    for ours, theirs in both_errors(slope, *(x.astype(dtype) for x in (query, key, value))):
        assert ours < 1.5 * theirs, (ours, theirs)


def chunked_causal(query, key, value):
    return attention(query, key, value, pattern=PATTERNS["causal"], scale=0.3, implementation="chunked")


@pytest.mark.parametrize(("length", "margin"), [(200, 250), (1024, 500)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_codes_of_any_two_documents_are_a_margin_apart(dtype: str, length: int, margin: int) -> None:
    """The scores of a diverging head reach hundreds; 200 documents fill the bits of their 8 dimensions."""
    segments = jnp.arange(length, dtype=jnp.int32)[None]
    zeros = jnp.zeros((1, length, 1, 8), dtype)
    query, key, value = append_codes(zeros, zeros, zeros, segments, segments, scale=0.125)
    assert query.shape[-1] == value.shape[-1] == (16 if length < 256 else 24)
    score = 0.125 * np.asarray(query[0, :, 0], np.float64) @ np.asarray(key[0, :, 0], np.float64).T
    same = np.diagonal(score)
    assert np.ptp(same) == 0  # one constant, which a softmax cancels
    assert np.max(score + np.diag(np.full(length, -np.inf))) < same[0] - margin
    assert not np.any(np.asarray(value))


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
    ones = jnp.ones((2, 1024), jnp.int32)
    packed = Pattern(query_segments=ones, key_segments=ones)
    reasons = {
        "head_dim a multiple of 8 up to 256, got 12": ((4, 4, 12), Pattern(), None),
        "got 248 with document codes to 264": ((1024, 1024, 248), packed, None),
        "4 queries and 8 keys": ((4, 8, 8), Pattern(causal=True), None),
        "a window for causal attention only": ((4, 4, 8), Pattern(window=2), None),
        "a window holds padding only": ((4, 4, 8), Pattern(causal=True, window=2, key_lengths=ones[:, 0]), None),
        "at even lengths only, got 5 and 4": ((5, 4, 8), Pattern(), jnp.zeros((1, 6, 5, 4))),
        "broadcasts a bias over the batch only": ((4, 4, 8), Pattern(), jnp.zeros((1, 1, 4, 4))),
        "not trusted with bias, 64 keys beyond": ((320, 320, 64), Pattern(causal=True), jnp.zeros((1, 6, 320, 320))),
    }
    for reason, ((length, keys, width), pattern, bias) in reasons.items():
        query = jnp.zeros((2, length, 6, width), jnp.bfloat16)
        key = jnp.zeros((2, keys, 3, width), jnp.bfloat16)
        assert reason in (obstacle(query, key, pattern=pattern, bias=bias) or "")


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
