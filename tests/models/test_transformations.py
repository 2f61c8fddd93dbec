"""jax's own switches and transformations around the models: what a user may turn on or wrap around them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import LlamaConfig, T5Config, TrainingConfig
from jaxllm.models import abstract_params, build, init_params
from jaxllm.training.loss import build_loss

LLAMA = LlamaConfig(vocab_size=50, d_model=16, d_ff=24, num_layers=2, num_heads=4, num_kv_heads=2, max_length=32)
T5 = T5Config(vocab_size=50, d_model=16, d_ff=24, num_layers=2, num_heads=2, head_dim=8)
TOKENS = np.arange(12, dtype=np.int32).reshape(2, 6)
BOTH = pytest.mark.parametrize("config", [LLAMA, T5], ids=["llama", "t5"])


def batch_of(config: LlamaConfig | T5Config) -> dict[str, jax.Array]:
    names = ("encoder_tokens", "decoder_tokens") if config.family == "t5" else ("tokens",)
    tokens = jnp.asarray(TOKENS)
    return dict.fromkeys(names, tokens) | {"targets": tokens[:, ::-1], "weights": jnp.ones(TOKENS.shape, jnp.float32)}


def mean_loss(config: LlamaConfig | T5Config, dtype: str = "float32") -> Callable[[Any], Any]:
    loss = build_loss(build(config, dtype=dtype), TrainingConfig(loss_chunk=8))

    def mean(params: Any) -> Any:
        sums = loss(params, batch_of(config), None)
        return sums.loss / sums.weight

    return mean


@BOTH
def test_parameters_are_float32_under_x64(config: LlamaConfig | T5Config) -> None:
    want = init_params(build(config), jax.random.key(0))
    with jax.enable_x64(True):
        got = init_params(build(config), jax.random.key(0))
        assert {leaf.dtype.name for leaf in jax.tree.leaves((got, abstract_params(build(config))))} == {"float32"}
        assert all(map(np.array_equal, jax.tree.leaves(got), jax.tree.leaves(want)))


@BOTH
def test_a_float32_loss_keeps_to_strict_promotion(config: LlamaConfig | T5Config) -> None:
    trace, params = jax.make_jaxpr(jax.value_and_grad(mean_loss(config))), abstract_params(build(config))
    with jax.numpy_dtype_promotion("strict"):
        assert jax.tree.leaves(trace(params).out_avals)


@pytest.mark.parametrize(("config", "attention"), [(LLAMA, "chunked"), (T5, "reference")], ids=["llama", "t5"])
def test_derivatives_along_a_direction_and_of_derivatives(config: LlamaConfig | T5Config, attention: str) -> None:
    """Reverse mode works directly; forward mode needs `forward_mode`, and jax refuses it otherwise (as in README)."""
    mean = jax.jit(mean_loss(dataclasses.replace(config, attention=attention)))
    gradient, params = jax.jit(jax.grad(mean)), init_params(build(config), jax.random.key(0))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [0.02 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    along = jax.tree.unflatten(structure, drawn)

    def inner(left: Any, right: Any) -> Any:
        return sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True))

    def slope(function: Callable[[Any], Any], width: float = 0.1) -> float:
        """A fourth-order difference, whose error depends little on its width."""

        def at(steps: int) -> Any:
            return function(jax.tree.map(lambda leaf, towards: leaf + steps * width * towards, params, along))

        return float(8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * width)

    value, backward = jax.vjp(mean, params)
    (tangent,) = jax.vjp(lambda cotangent: backward(cotangent)[0], jnp.ones_like(value))[1](along)
    assert float(tangent) == pytest.approx(slope(mean), rel=0.01)
    curvature = inner(jax.jit(jax.grad(lambda p: inner(jax.grad(mean)(p), along)))(params), along)
    assert float(curvature) == pytest.approx(slope(lambda p: inner(gradient(p), along)), rel=0.01)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(mean, (params,), (along,))
