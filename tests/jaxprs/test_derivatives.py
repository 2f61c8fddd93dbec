"""`forward_mode` changes no value and no derivative, and lets jax go forward through rules of the backward pass."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import LlamaConfig, T5Config, TrainingConfig
from jaxllm.models import build, init_params
from jaxllm.ops.linear import linear
from jaxllm.study import capture, forward_mode
from jaxllm.training.loss import build_loss

SIZES: dict[str, Any] = {"vocab_size": 50, "d_model": 16, "d_ff": 24, "num_layers": 2, "num_heads": 4}
LLAMA = LlamaConfig(**SIZES, num_kv_heads=2, sliding_window=9, attention="chunked", remat="elementwise")
T5 = T5Config(**SIZES, head_dim=4, attention="chunked", layers="unroll")
LENGTH = 150  # several blocks of the chunked attention


def loss_of(config: LlamaConfig | T5Config, dtype: str = "float32") -> tuple[Callable[[Any], jax.Array], Any]:
    """Mean loss of a batch whose rows hold documents (Llama) or end early (T5), and parameters."""
    tokens = jnp.arange(2 * LENGTH).reshape(2, LENGTH) * 7 % 50
    batch = {"targets": tokens[:, ::-1], "weights": jnp.ones(tokens.shape, jnp.float32)}
    if config.family == "t5":
        batch |= {"encoder_tokens": tokens, "decoder_tokens": tokens, "encoder_lengths": jnp.array([LENGTH, 71])}
    else:
        batch |= {"tokens": tokens, "segment_ids": jnp.arange(LENGTH)[None] // jnp.array([[40], [60]]) + 1}
    model = build(config, dtype=dtype)
    loss = build_loss(model, TrainingConfig(loss_chunk=64, z_loss=1e-3))
    return lambda params: loss(params, batch, None).loss / LENGTH, init_params(model, jax.random.key(0))


def inner(left: Any, right: Any) -> jax.Array:
    return sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True))


@pytest.mark.parametrize("config", [LLAMA, T5], ids=["llama", "t5"])
def test_forward_agrees_with_backward(config: LlamaConfig | T5Config) -> None:
    loss, params = loss_of(config)
    key, plain = jax.random.key(1), forward_mode(loss)
    along = jax.tree.map(lambda leaf: jax.random.normal(key, leaf.shape), params)
    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    forward = jax.jit(lambda p, v: (*jax.jvp(plain, (p,), (v,)), jax.jvp(jax.grad(plain), (p,), (v,))))
    same, slope, (gradient_again, curvature) = forward(params, along)
    assert float(same) == pytest.approx(float(value), rel=1e-6)
    assert float(slope) == pytest.approx(float(inner(gradient, along)), rel=1e-4)
    for found, want in zip(jax.tree.leaves(gradient_again), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(found, want, atol=1e-5 * float(jnp.abs(want).max()))
    backward = jax.jit(jax.grad(lambda p: inner(jax.grad(loss)(p), along)))(params)
    for found, want in zip(jax.tree.leaves(curvature), jax.tree.leaves(backward), strict=True):
        np.testing.assert_allclose(found, want, atol=1e-4 * float(jnp.abs(want).max()))


def test_a_jacobian_a_linearisation_and_a_hessian() -> None:
    kernel = jax.random.normal(jax.random.key(0), (5, 3))
    scores, x = forward_mode(lambda x: jnp.tanh(linear(x, kernel))), jnp.arange(5.0) / 9
    np.testing.assert_allclose(jax.jacfwd(scores)(x), jax.jacrev(scores)(x), rtol=1e-5)
    np.testing.assert_allclose(jax.linearize(scores, x)[1](x), jax.jacrev(scores)(x) @ x, rtol=1e-5)
    curvature = jax.hessian(forward_mode(lambda x: jnp.sum(jnp.tanh(linear(x, kernel)) ** 2)))(x)
    np.testing.assert_allclose(curvature, curvature.T, rtol=1e-4, atol=1e-6)


def test_it_composes_with_capture() -> None:
    loss, params = loss_of(LLAMA)
    along = jax.tree.map(jnp.ones_like, params)
    seen = forward_mode(lambda p: capture(loss, "after_mlp")(p)[1]["layers/after_mlp"])
    values, moved = jax.jit(lambda p: jax.jvp(seen, (p,), (along,)))(params)
    assert values.shape == moved.shape == (2, 2, LENGTH, 16) and float(jnp.abs(moved).min()) > 0


def test_a_forward_rule_of_the_user_stays() -> None:
    @jax.custom_jvp
    def squared(x: jax.Array) -> jax.Array:
        return linear(x, jnp.eye(3)) ** 2

    squared.defjvp(lambda primals, tangents: (squared(*primals), 7 * tangents[0]))
    x = jnp.arange(3.0)
    moved = jax.jvp(forward_mode(lambda x: squared(linear(x, jnp.eye(3)))), (x,), (x,))[1]
    np.testing.assert_array_equal(moved, 7 * x)


def test_a_rule_in_a_while_loop_stays_and_jax_says_so() -> None:
    def powers(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda at: at[0] < 3, lambda at: (at[0] + 1, linear(at[1], jnp.eye(2))), (0, x))[1]

    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(forward_mode(powers), (jnp.ones(2),), (jnp.ones(2),))


@pytest.mark.parametrize("config", [LLAMA, T5], ids=["llama", "t5"])
@pytest.mark.parametrize(
    "forward",
    [
        lambda f, p: jax.jvp(f, (p,), (p,)),
        lambda f, p: jax.jvp(jax.jit(f), (p,), (p,)),
        lambda f, p: jax.jit(lambda p: jax.jvp(f, (p,), (p,)))(p),
        lambda f, p: jax.linearize(f, p)[1](p),
        lambda f, p: jax.jacfwd(f)(p),
        lambda f, p: jax.hessian(f)(p),
    ],
    ids=["jvp", "jvp of jit", "jit of jvp", "linearize", "jacfwd", "hessian"],
)
def test_going_forward_without_it_ends_in_an_error_that_names_it(
    forward: Callable[[Any, Any], Any], config: LlamaConfig | T5Config
) -> None:
    """Of what jit or a loop has compiled, jax shows the line that it cannot differentiate above its error."""
    for function, at in (loss_of(config), (loop_of_matmuls, jnp.ones(2))):
        with pytest.raises(TypeError, match="forward-mode") as caught:
            forward(function, at)
        assert "jaxllm.study.forward_mode(f)" in "".join(traceback.format_exception(caught.value))


def loop_of_matmuls(x: jax.Array) -> jax.Array:
    return jnp.sum(jax.lax.scan(lambda x, _: (linear(x, jnp.eye(2)), None), x, None, length=3)[0] ** 2)
