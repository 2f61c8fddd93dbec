"""A subclass of a family's model decodes as it computes, or is refused by name."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import LlamaConfig, T5Config
from jaxllm.generation import BeamSettings, beam_search, generate, generate_stream, score
from jaxllm.models import T5, Llama, build, init_params

SIZES: dict[str, Any] = {"vocab_size": 50, "d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2}
LLAMA, SMALL_T5 = LlamaConfig(**SIZES), T5Config(**SIZES, head_dim=8)


class Unrotated(Llama):
    """No positions."""

    def hidden(self, tokens: jax.Array, **options: Any) -> jax.Array:
        return super().hidden(tokens, **{**options, "positions": tokens * 0})


class Backwards(T5):
    """The least likely token first."""

    def logits(self, x: jax.Array) -> jax.Array:
        return -super().logits(x)


class Compiled(Llama):
    """An override that is not a plain function."""

    head = nn.jit(Llama.head)


class Deeper(Backwards):
    """Overrides nothing itself."""


class Named(Llama):
    """Adds a field and a method, and overrides what no decoding needs."""

    label: str = "plain"

    def first(self, x: jax.Array) -> jax.Array:
        return self.logits(x)[:, 0]

    def lens(self, x: jax.Array) -> jax.Array:
        return super().lens(x) * 2


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (Unrotated(LLAMA), "Unrotated.hidden"),
        (Backwards(SMALL_T5), "Backwards.logits"),
        (Deeper(SMALL_T5), "Deeper.logits"),
        (Compiled(LLAMA), "Compiled.head"),
    ],
)
def test_an_overridden_method_is_refused_by_name(model: Any, name: str) -> None:
    params, prompts = init_params(model, jax.random.key(0)), [[3, 4, 5]]
    for call in (
        lambda: generate(model, params, prompts, max_new_tokens=2),
        lambda: list(generate_stream(model, params, prompts, max_new_tokens=2)),
        lambda: beam_search(model, params, prompts, max_new_tokens=2, search=BeamSettings(beams=2)),
    ):
        with pytest.raises(TypeError, match=f"cannot decode with {name}: .* would ignore it; use score"):
            call()


def test_a_subclass_that_overrides_nothing_decodes_as_the_original() -> None:
    model, plain = Named(LLAMA), build(LLAMA)
    params = init_params(plain, jax.random.key(0))
    prompts = [[3, 4, 5], [7, 8]]
    assert generate(model, params, prompts, max_new_tokens=4) == generate(plain, params, prompts, max_new_tokens=4)


def test_score_calls_what_a_subclass_overrides() -> None:
    model = Unrotated(LLAMA)
    params = init_params(model, jax.random.key(0))
    (found,) = score(model, params, [[3, 4]], [[5, 6]])
    logits = jax.nn.log_softmax(model.apply({"params": params}, jnp.array([[3, 4, 5, 6]]))[0])
    np.testing.assert_allclose(found, [logits[1, 5], logits[2, 6]], rtol=1e-4)
