"""Typical mistakes of ports, one at a time: each must move the logits beyond the tolerance of the correct model.

Compared with the recorded results, so that this check of the suite does not depend on torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.config import LlamaConfig, RopeConfig
from jaxllm.models import build
from jaxllm.models.llama import model as llama
from jaxllm.ops.attention import attention
from tests.parity import llama_cases as cases


def error(name: str, config: LlamaConfig, params: Any) -> float:
    model = build(config)
    found = jax.jit(lambda p: model.apply({"params": p}, jnp.asarray(cases.tokens())))(params)
    return cases.logit_error(found, cases.load_golden(name)["logits"])


def interleaved(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Neighbours as pairs, the layout of Meta's files."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    first, second = x[..., 0::2], x[..., 1::2]
    return jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(x.shape)


def tiled(query: jax.Array, key: jax.Array, value: jax.Array, **settings: Any) -> jax.Array:
    """Query head n reads key head n modulo K instead of n // G."""
    heads, kv_heads = query.shape[2], key.shape[2]
    order = np.argsort(np.arange(heads) % kv_heads, kind="stable")
    return attention(query[:, :, order], key, value, **settings)[:, :, np.argsort(order)]


def half_precision_angles(positions: jax.Array, frequencies: Any, scaling: float) -> tuple[jax.Array, jax.Array]:
    angles = positions[..., None].astype(jnp.float16) * jnp.asarray(frequencies, jnp.float16)
    return (jnp.cos(angles) * scaling).astype(jnp.float32), (jnp.sin(angles) * scaling).astype(jnp.float32)


def without(*path: str) -> Callable[[Any], Any]:
    """Zeros a parameter."""

    def change(params: Any) -> Any:
        key, *rest = path
        return {**params, key: without(*rest)(params[key])} if rest else {**params, key: jnp.zeros_like(params[key])}

    return change


def ignored_scaling(config: LlamaConfig) -> LlamaConfig:
    return dataclasses.replace(config, rope=RopeConfig(theta=config.rope.theta))


def other_epsilon(config: LlamaConfig) -> LlamaConfig:
    return dataclasses.replace(config, norm_eps=1e-6)


def no_window(config: LlamaConfig) -> LlamaConfig:
    return dataclasses.replace(config, sliding_window=None)


def wrong_window(config: LlamaConfig) -> LlamaConfig:
    return dataclasses.replace(config, sliding_window=config.sliding_window + 1)


@pytest.mark.parametrize(
    ("name", "patch"),
    [
        ("mha", {"apply_rope": interleaved}),
        ("mha", {"rope_cos_sin": half_precision_angles}),
        ("odd_groups_narrow_heads", {"attention": tiled}),
    ],
)
def test_faults_of_functions_are_caught(name: str, patch: dict, monkeypatch, llama_directory) -> None:
    model, params = jaxllm.load_hf(llama_directory(name))
    for target, fault in patch.items():
        monkeypatch.setattr(llama, target, fault)
    assert error(name, model.config, params) > 5 * cases.LOGITS


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("gqa_tied_linear", ignored_scaling),
        ("mqa_wide_heads_dynamic", ignored_scaling),
        ("odd_heads_llama3", ignored_scaling),
        ("biases_yarn_mscale", ignored_scaling),
        ("longrope_long", ignored_scaling),
        ("mha", other_epsilon),
        ("mistral", no_window),
        ("mistral", wrong_window),
    ],
)
def test_faults_of_settings_are_caught(name: str, fault: Callable, llama_directory) -> None:
    model, params = jaxllm.load_hf(llama_directory(name))
    assert error(name, fault(model.config), params) > 5 * cases.LOGITS


def test_a_dropped_bias_is_caught(llama_directory) -> None:
    """Every one of them."""
    name = "biases_yarn_mscale"
    model, params = jaxllm.load_hf(llama_directory(name))
    want = cases.load_golden(name)["logits"]
    run = jax.jit(lambda p: model.apply({"params": p}, jnp.asarray(cases.tokens())))
    assert cases.logit_error(run(params), want) < cases.LOGITS
    for layer in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert cases.logit_error(run(without("layers", layer, "bias")(params)), want) > 5 * cases.LOGITS, layer
