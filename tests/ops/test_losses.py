"""The chunked vocabulary loss against the plain one, its memory and its number of matmuls."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.jaxprs.interpret import forward_mode
from jaxllm.ops import losses
from jaxllm.ops.losses import chunked_cross_entropy
from tests.conftest import TOLERANCE


def problem(dtype=jnp.float32):
    hidden = jax.random.normal(jax.random.key(0), (3, 10, 16)).astype(dtype)
    head = (jax.random.normal(jax.random.key(1), (50, 16)) * 0.5).astype(dtype)
    targets = jax.random.randint(jax.random.key(2), (3, 10), 0, 50)
    weights = jnp.ones((3, 10)).at[0, 4:].set(0).at[1].set(0.5)
    return hidden, head, targets, weights


def plain(hidden, head, targets, weights, z_loss):
    logits = jnp.einsum("btd,vd->btv", hidden.astype(jnp.float32), head.astype(jnp.float32))
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (normalizer - target + z_loss * normalizer**2))


@pytest.mark.parametrize("chunk", [1, 7, 10, 30, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_equals_plain_loss_and_gradient(chunk: int, z_loss: float) -> None:
    hidden, head, targets, weights = problem()
    ours = jax.value_and_grad(
        lambda h, w: 3 * chunked_cross_entropy(h, w, targets, weights, z_loss=z_loss, chunk=chunk).loss,
        argnums=(0, 1),
    )(hidden, head)
    want = jax.value_and_grad(lambda h, w: 3 * plain(h, w, targets, weights, z_loss), argnums=(0, 1))(hidden, head)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE["float32_grad"], rtol=TOLERANCE["float32"])


def test_sums_count_weights_and_hits() -> None:
    hidden, head, targets, weights = problem()
    sums = chunked_cross_entropy(hidden, head, targets, weights, z_loss=0.1, chunk=4)
    hits = jnp.argmax(jnp.einsum("btd,vd->btv", hidden, head), axis=-1) == targets
    assert float(sums.weight) == float(weights.sum()) == 4 + 5 + 10
    np.testing.assert_allclose(sums.correct, jnp.sum(weights * hits), rtol=1e-6)
    np.testing.assert_allclose(sums.nll, plain(hidden, head, targets, weights, 0.0), rtol=1e-5)
    assert float(sums.loss) > float(sums.nll)


def test_sure_predictions_keep_their_small_losses_and_gradients() -> None:
    """Logits of a thousand, right by a margin of seven: losses of 1e-3 that the logits' own rounding would swallow."""
    targets = jnp.arange(20)[None]
    head = jnp.eye(20)  # the hidden states are the logits
    hidden = 1000.0 + 7 * jnp.eye(20)[None] + jax.random.normal(jax.random.key(0), (1, 20, 20)) / 8
    loss, grad = jax.value_and_grad(lambda h: chunked_cross_entropy(h, head, targets, jnp.ones((1, 20))).loss)(hidden)
    logits = np.asarray(hidden[0], np.float64)
    softmax = np.exp(logits - logits.max(axis=1, keepdims=True))
    softmax /= softmax.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(loss, -np.log(np.diagonal(softmax)).sum(), rtol=1e-5)
    np.testing.assert_allclose(grad[0], softmax - np.eye(20), atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_gradients_are_close(dtype: str) -> None:
    hidden, head, targets, weights = problem(dtype)
    ours = jax.grad(lambda h, w: chunked_cross_entropy(h, w, targets, weights).loss, argnums=(0, 1))(hidden, head)
    want = jax.grad(lambda h, w: plain(h, w, targets, weights, 0.0), argnums=(0, 1))(
        hidden.astype(jnp.float32), head.astype(jnp.float32)
    )
    for a, b in zip(ours, want, strict=True):
        assert a.dtype == dtype
        difference = np.abs(np.asarray(a, np.float32) - np.asarray(b)).max()
        assert difference < TOLERANCE[dtype] * np.abs(np.asarray(b)).max()


def test_float16_keeps_gradients_of_unlikely_tokens() -> None:
    """Probabilities near 1e-8 vanish in float16 unless they are carried at a larger scale."""
    hidden, head = jnp.ones((1, 1, 1), jnp.float16), jnp.array([[0.0], [-16.5]], jnp.float16)
    targets, weights = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1))
    grad = jax.grad(lambda w: 4096 * chunked_cross_entropy(hidden, w, targets, weights).loss)(head)
    np.testing.assert_allclose(float(grad[1, 0]), 4096 * np.exp(-16.5), rtol=0.02)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_of_rows_are_rounded_once_under_a_large_head(dtype: str) -> None:
    """T5's tied embeddings hold numbers in the hundreds: times float16's inner scale they are infinite."""
    hidden, head, targets, weights = problem(dtype)
    hidden, head = hidden / 300, 600 * head

    def slope(h, dtype):
        sums = chunked_cross_entropy(h.astype(dtype), head.astype(dtype), targets, weights, chunk=7)
        return 3 / 19 * sums.loss

    ours, want = (np.asarray(jax.grad(slope)(hidden, x), np.float32) for x in (dtype, "float32"))
    # A rounding of the logits' gradient, an average over the vocabulary, and the one that is left.
    assert np.linalg.norm(ours - want) < 0.35 * float(jnp.finfo(dtype).eps) * np.linalg.norm(want)


def test_three_products_with_the_head_and_never_all_logits() -> None:
    hidden = jax.ShapeDtypeStruct((4, 256, 64), jnp.float32)
    head = jax.ShapeDtypeStruct((4096, 64), jnp.float32)
    targets, weights = jax.ShapeDtypeStruct((4, 256), jnp.int32), jax.ShapeDtypeStruct((4, 256), jnp.float32)

    def loss(h, w, t, u):
        return chunked_cross_entropy(h, w, t, u, chunk=64).loss

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    assert str(jax.make_jaxpr(gradient)(hidden, head, targets, weights)).count("dot_general") == 3
    memory = gradient.lower(hidden, head, targets, weights).compile().memory_analysis().temp_size_in_bytes
    all_logits = 4 * 256 * 4096 * 4
    assert memory < all_logits / 2


@pytest.mark.parametrize("target", [-100, -1, 11])
def test_a_target_outside_the_vocabulary_is_nan_or_weighs_nothing(target: int) -> None:
    """An id such as torch's ignored -100 must not be learned as the hundredth from the end."""
    hidden, head = jax.random.normal(jax.random.key(0), (1, 3, 4)), jax.random.normal(jax.random.key(1), (11, 4))
    targets = jnp.array([[1, target, 3]])
    masked = chunked_cross_entropy(hidden, head, targets, jnp.array([[1.0, 0.0, 1.0]]))
    want = chunked_cross_entropy(hidden, head, targets.at[0, 1].set(0), jnp.array([[1.0, 0.0, 1.0]]))
    assert masked == want
    assert jnp.isnan(chunked_cross_entropy(hidden, head, targets, jnp.ones((1, 3))).loss)


def test_one_pass_over_the_logits_equals_two() -> None:
    logits = 30 * jax.random.normal(jax.random.key(0), (6, 400))
    logits = logits.at[1].set(-jnp.inf).at[1, 7].set(2.0).at[2].add(1e30).at[3, 5].set(jnp.nan).at[4, 9].set(jnp.inf)
    one, two = losses._in_one_pass(logits), losses._largest_and_sum(logits)
    np.testing.assert_array_equal(one[0], two[0])
    np.testing.assert_allclose(one[1], two[1], rtol=1e-5)
    assert float(one[1][1]) == 1 and np.isnan(one[1][3]) and np.isnan(one[1][4])
    low = logits.astype(jnp.bfloat16)
    assert losses._in_one_pass(low)[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(losses._in_one_pass(low)[1], losses._largest_and_sum(low)[1], rtol=1e-5)


def test_a_gpu_s_loss_is_the_cpu_s_in_every_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, targets, weights = problem()

    def loss(h):
        return chunked_cross_entropy(h, head, targets, weights, z_loss=1e-2, chunk=7).loss

    def derivatives():
        curvature = jax.jvp(jax.grad(forward_mode(loss)), (hidden,), (jnp.sin(hidden),))[1]
        return *jax.value_and_grad(loss)(hidden), curvature

    want = derivatives()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for a, b in zip(derivatives(), want, strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE["float32_grad"], rtol=TOLERANCE["float32"])


def test_bfloat16_logits_keep_their_exponentials_and_sums_in_float32() -> None:
    hidden, head, targets, weights = problem()
    low = chunked_cross_entropy(hidden, head, targets, weights, chunk=7, logits_dtype=jnp.bfloat16)
    rounded = jnp.einsum("btd,vd->btv", hidden, head).astype(jnp.bfloat16).astype(jnp.float32)
    chosen = jnp.take_along_axis(rounded, targets[..., None], axis=-1)[..., 0]
    want = jnp.sum(weights * (jax.nn.logsumexp(rounded, axis=-1) - chosen))
    np.testing.assert_allclose(low.loss, want, rtol=1e-5)
