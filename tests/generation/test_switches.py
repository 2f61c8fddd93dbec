"""jax's switches change nothing that is decoded, and its transformations are refused by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import LlamaConfig, T5Config
from jaxllm.generation import (
    BeamSettings,
    Sampling,
    beam_search,
    generate,
    generate_stream,
    score,
)
from jaxllm.models import build, init_params
from tests.generation.uncached import generate_checked

CONFIG = {
    "llama": LlamaConfig(vocab_size=50, d_model=16, d_ff=24, num_layers=1, num_heads=2, max_length=64),
    "t5": T5Config(vocab_size=50, d_model=16, d_ff=24, num_layers=1, num_heads=2, head_dim=8),
}
PROMPTS = [[1, 2, 3, 1, 2], [4]]
DRAWN = Sampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.1, min_new_tokens=2)
WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "generate": functools.partial(generate_checked, prompts=PROMPTS, max_new_tokens=4),
    "sample": functools.partial(generate, prompts=PROMPTS, max_new_tokens=4, sampling=DRAWN, eos_ids=[3]),
    "int8": functools.partial(generate, prompts=PROMPTS, max_new_tokens=4, cache_dtype="int8"),
    "stream": lambda *model: list(generate_stream(*model, PROMPTS, max_new_tokens=4)),
    "beams": lambda *model: [
        beam.tokens
        for row in beam_search(*model, PROMPTS, max_new_tokens=4, search=BeamSettings(beams=2))
        for beam in row
    ],
    "score": lambda *model: np.round(score(*model, PROMPTS, [[5], [6]]), 4).tolist(),
}


@functools.cache
def make(family: str) -> tuple[Any, Any]:
    model = build(CONFIG[family])
    return model, init_params(model, jax.random.key(0))


OWN = ("sample", "beams")  # the ways that compute most themselves


@pytest.mark.parametrize(("family", "way"), [*(("llama", way) for way in WAYS), *(("t5", way) for way in OWN)])
def test_x64_changes_nothing(family: str, way: str) -> None:
    """Warnings are errors in tests, including jax's announcements of future errors."""
    want = WAYS[way](*make(family))
    with jax.enable_x64(True):
        assert WAYS[way](*make(family)) == want


@pytest.mark.parametrize("way", OWN)
def test_strict_promotion_changes_nothing(way: str) -> None:
    want = WAYS[way](*make("t5"))
    with jax.numpy_dtype_promotion("strict"):
        assert WAYS[way](*make("t5")) == want


@pytest.mark.parametrize("way", WAYS)
def test_transformations_are_refused_by_name(way: str) -> None:
    model, params = make("llama")
    run, twice = WAYS[way], jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    message = "works on lists, on the host: call it outside jax.jit, vmap and grad"
    for transformed in (
        lambda: jax.jit(lambda p: jnp.asarray(run(model, p)))(params),
        lambda: jax.jit(lambda: jnp.asarray(run(model, params)))(),
        lambda: jax.vmap(lambda p: jnp.asarray(run(model, p)))(twice),
        lambda: jax.grad(lambda p: run(model, p))(params),
    ):
        with pytest.raises(ValueError, match=message):
            transformed()
