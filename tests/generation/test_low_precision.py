"""Decoding in bfloat16 and float16, cache and prepared parameters included: as accurate as a full forward."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.generation import loop
from jaxllm.generation.requests import make_request
from jaxllm.models import build, init_params
from jaxllm.models.layers import Linear, apply
from jaxllm.models.llama import decode as llama_decode
from tests.generation import test_decoding as llama
from tests.generation import test_t5_generate as t5
from tests.generation.uncached import full_logits, steps

CONFIGS = {
    "llama": dataclasses.replace(llama.CONFIG, **llama.FAMILY["everything"]),
    "t5": t5.CONFIG,
}


@functools.cache
def parameters(family: str) -> Any:
    """Initial ones and noise, since initial biases and norms would hide a mistake."""
    rng = np.random.default_rng(1)
    params = init_params(build(CONFIGS[family]), jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", CONFIGS)
def test_steps_agree_with_a_full_forward_within_the_rounding(family: str, dtype: str) -> None:
    """Next to the full forward, and both next to float32: caching may not lose any of the format's digits."""
    model, exact = (build(CONFIGS[family], dtype=jnp.dtype(name)) for name in (dtype, "float32"))
    params = parameters(family)
    r, in_float32 = (make_request(each, params, llama.PROMPTS, max_new_tokens=8) for each in (model, exact))
    _, state = loop.begin(r.decoder, r.settings, r.params, r.tokens, r.lengths, r.keys)
    assert {x.dtype.name for x in jax.tree.leaves((r.params, state.cache.keys, state.cache.values))} == {dtype}
    tokens, cached = steps(r)
    whole, truth = full_logits(r, params, tokens), full_logits(in_float32, params, tokens)

    def error(left: np.ndarray, right: np.ndarray) -> float:
        return float(np.sqrt(np.mean((left - right) ** 2)) / truth.std())

    assert 0 < error(cached, whole) < 2 * float(jnp.finfo(dtype).eps)
    assert error(cached, truth) < 1.3 * error(whole, truth)
    # Greedy: each token is the largest of its step's logits, and of the full forward's as far as rounding can tell.
    np.testing.assert_array_equal(tokens, cached.argmax(axis=-1))
    missed = whole.max(axis=-1) - np.take_along_axis(whole, tokens[..., None], axis=-1)[..., 0]
    assert missed.max() <= 2 * np.abs(cached - whole).max()


def test_joined_projections_round_their_bias_as_training_does() -> None:
    """To the bit: factors are so short that any order of summation is exact, and only the last rounding can differ."""
    config = dataclasses.replace(CONFIGS["llama"], num_layers=1)
    rng = np.random.default_rng(2)
    params: Any = init_params(build(config), jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(rng.integers(-8, 9, x.shape) / 8, jnp.float32), params)
    layer = llama_decode.prepare_for_decode(params, dtype=jnp.bfloat16).layers[0]
    x = jnp.asarray(rng.integers(-64, 65, (5, config.d_model)) / 16, jnp.bfloat16)

    def trained(name: str) -> jax.Array:
        part = jax.tree.map(lambda leaf: leaf[0], params["layers"][name])
        return apply(Linear(*part["kernel"].shape, 1.0, True), part, x)

    for joined, names in ((layer.qkv, ("q_proj", "k_proj", "v_proj")), (layer.gate_up, ("gate_proj", "up_proj"))):
        np.testing.assert_array_equal(joined(x), jnp.concatenate([trained(name) for name in names], axis=1))
