"""Decoding under edits: the same as decoding with parameters that do the same, in every way of decoding."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import jaxllm
from jaxllm.generation import (
    BeamSettings,
    beam_search,
    edited,
    generate,
    generate_stream,
    loop,
    score,
)
from jaxllm.models import decoder_of
from tests.generation.uncached import generate_checked

SIZES = {"vocab_size": 61, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4}
CONFIGS = {
    "llama": jaxllm.LlamaConfig(**SIZES, num_kv_heads=2, max_length=64),
    "window": jaxllm.LlamaConfig(**SIZES, num_kv_heads=2, max_length=64, sliding_window=4),
    "t5": jaxllm.T5Config(**SIZES, head_dim=8),
}
PROMPTS = [[5, 6, 7, 5, 6], [8, 9, 10, 11, 12, 13, 8, 9], [14]]


@functools.cache
def family(name: str) -> tuple[Any, Any, Any]:
    """A model, its parameters, and those with head 2 of layer 1 cut off and the MLPs' output doubled."""
    model = jaxllm.build(CONFIGS[name])
    rng = np.random.default_rng(1)
    params = jaxllm.init_params(model, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), params)

    def change(path: Any, leaf: jax.Array) -> jax.Array:
        where = jax.tree_util.keystr(path)
        if "o_proj" in where:
            return leaf.at[1, 16:24].set(0)
        return leaf * 2 if "down_proj" in where else leaf

    return model, params, jax.tree_util.tree_map_with_path(change, params)


EDITS = {
    "heads": lambda x, layer: jnp.where(layer == 1, x.at[:, :, 2].set(0), x),
    "mlp_output": lambda x, layer: x * 2,
}


def test_the_error_of_an_edit_ends_a_generation() -> None:
    model, params, _ = family("llama")
    with pytest.raises(ValueError, match=r"the edit of heads must be a function of \(value, layer\)"):
        generate(model, edited(params, {"heads": lambda x: x}), PROMPTS, max_new_tokens=2)
    with pytest.raises(TypeError, match="contracting dimensions"):
        generate(model, edited(params, {"heads": lambda x, layer: x @ jnp.ones((3, 3))}), PROMPTS, max_new_tokens=2)


@pytest.mark.parametrize("name", ["window", "t5"])
def test_every_way_of_decoding_is_edited(name: str) -> None:
    model, params, changed = family(name)
    altered = edited(params, EDITS)
    want = generate(model, changed, PROMPTS, max_new_tokens=12)
    assert want != generate(model, params, PROMPTS, max_new_tokens=12)
    assert generate_checked(model, altered, PROMPTS, max_new_tokens=12) == want
    prepared = edited(decoder_of(model).prepare(params), EDITS)
    parts = list(generate_stream(model, prepared, PROMPTS, max_new_tokens=12))
    assert [list(itertools.chain(*rows)) for rows in zip(*parts, strict=True)] == want
    found, wanted = (
        beam_search(model, p, PROMPTS, max_new_tokens=6, search=BeamSettings(beams=2)) for p in (altered, changed)
    )
    assert [[beam.tokens for beam in row] for row in found] == [[beam.tokens for beam in row] for row in wanted]
    scores = (np.concatenate(score(model, p, PROMPTS, want)) for p in (altered, changed))
    np.testing.assert_allclose(*scores, rtol=1e-4, atol=1e-5)


def test_another_vector_compiles_nothing() -> None:
    model, params, _ = family("llama")

    def steer(vector: jax.Array, x: jax.Array, layer: Any) -> jax.Array:
        return jnp.where(layer == 0, x + vector, x)

    def run(vector: Any) -> list[list[int]]:
        return generate(model, edited(params, {"after_mlp": Partial(steer, vector)}), PROMPTS, max_new_tokens=5)

    assert run(jnp.zeros(32)) == generate(model, params, PROMPTS, max_new_tokens=5)
    before = loop.run._cache_size()
    assert run(20 * jax.random.normal(jax.random.key(3), (32,))) != run(jnp.zeros(32))
    assert loop.run._cache_size() == before


def test_edits_of_one_site_keep_their_order() -> None:
    model, params, _ = family("llama")
    both = edited(params, {"layers/heads": lambda x, layer: x * 0 + 1, "heads": lambda x, layer: x * 2})
    twos = edited(params, {"heads": lambda x, layer: x * 0 + 2})
    found, want = (np.concatenate(score(model, p, PROMPTS, PROMPTS)) for p in (both, twos))
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_what_cannot_be_edited_is_refused() -> None:
    model, params, _ = family("t5")
    with pytest.raises(ValueError, match="attention_weights can't be edited while decoding"):
        edited(params, {"cross_attention/attention_weights": lambda x, layer: x})
    with pytest.raises(ValueError, match="edited already: give all edits at once"):
        edited(edited(params, EDITS), EDITS)
    with pytest.raises(ValueError, match="'head' is not a hook point of the function; known: encoder/layers/input"):
        generate(model, edited(params, {"head": lambda x, layer: x}), PROMPTS, max_new_tokens=3)
    with pytest.raises(ValueError, match="the parameters are not those of the model"):
        score(model, edited(family("llama")[1], EDITS), PROMPTS, PROMPTS)
