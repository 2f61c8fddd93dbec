"""A text model is a function of text: it writes the tokens that `generate` gives for the ids of its prompt."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.tree_util import Partial

from jaxllm.config import LlamaConfig, T5Config
from jaxllm.data.tokenizer import train_tokenizer
from jaxllm.generation import Sampling, edited, generate
from jaxllm.generation.text import TextModel, filled_in
from jaxllm.models import build, init_params

SIZES: dict[str, Any] = {"vocab_size": 384, "d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8}
CONFIGS = {"llama": LlamaConfig(**SIZES, max_length=128), "t5": T5Config(**SIZES)}
PROMPTS = ["the cat <extra_id_0>", "mat"]


@functools.cache
def make(family: str) -> tuple[TextModel, Any]:
    """A text model, and its parameters as in training."""
    model = build(CONFIGS[family])
    params = init_params(model, jax.random.key(0))
    tokenizer = train_tokenizer(iter(["the cat sat on the mat"] * 9), vocab_size=384)
    return TextModel.of(model, params, tokenizer), params


@pytest.mark.parametrize("family", CONFIGS)
def test_text_is_that_of_the_generated_ids(family: str) -> None:
    text, params = make(family)
    end = text.tokenizer.eos_id
    assert (text.begin, text.eos_ids, text.pad_id) == ((end,), (end,), text.tokenizer.pad_id)
    warm = Sampling(temperature=1.0)
    ids = [text.encode(prompt) for prompt in PROMPTS]
    rows = generate(text.model, params, ids, max_new_tokens=8, sampling=warm, seed=3, eos_ids=(end,))
    want = [text.decode(row) for row in rows]
    assert text(PROMPTS, max_new_tokens=8, sampling=warm, seed=3) == want
    assert text(PROMPTS[0], max_new_tokens=8, sampling=warm, seed=3) == want[0]
    assert text(tuple(PROMPTS[:1]), max_new_tokens=8, sampling=warm, seed=3) == want[:1]
    assert "".join(text.stream(PROMPTS[0], max_new_tokens=8, sampling=warm, seed=3)) == want[0]
    assert len(text(PROMPTS, max_new_tokens=8, sampling=warm, samples=2)) == 4


def test_options_reach_the_generation() -> None:
    text, params = make("llama")
    whole = text("the cat", max_new_tokens=40, eos_ids=())
    stop = whole[10:13]
    cut = text("the cat", max_new_tokens=40, eos_ids=(), stop=(stop,))
    assert stop in cut and whole.startswith(cut) and len(cut) < len(whole)

    def shift(vector: jax.Array, x: jax.Array, layer: Any) -> jax.Array:
        return x + vector

    edits = {"after_mlp": Partial(shift, 20 * jax.random.normal(jax.random.key(3), (16,)))}
    (row,) = generate(text.model, edited(params, edits), [text.encode("the cat")], max_new_tokens=8, eos_ids=())
    steered = text("the cat", max_new_tokens=8, eos_ids=(), edits=edits)
    assert steered == text.decode(row) != text("the cat", max_new_tokens=8, eos_ids=())
    assert "".join(text.stream("the cat", max_new_tokens=8, eos_ids=(), edits=edits)) == steered


def test_blanks_are_filled_with_the_answer() -> None:
    text, _ = make("t5")
    prompt = "the <extra_id_0> sat"
    (answer,) = text.generate([text.encode(prompt)], max_new_tokens=8)
    assert text.fill(prompt, max_new_tokens=8) == filled_in(text.encode(prompt), answer, text.tokenizer)
    with pytest.raises(ValueError, match="only an encoder-decoder fills blanks; llama continues its prompt"):
        make("llama")[0].fill(prompt)


def test_what_text_cannot_hold_is_refused() -> None:
    text, params = make("llama")
    with pytest.raises(ValueError, match="one text cannot hold 2 samples: pass the prompt in a list"):
        text("the", sampling=Sampling(temperature=1.0), samples=2)
    with pytest.raises(TypeError, match="temperature"):
        text("the", temperature=1.0)
    with pytest.raises(ValueError, match="the parameters are not those of the model"):
        TextModel.of(text.model, params | {"embed": jnp.zeros((2, 2))}, text.tokenizer)
    with pytest.raises(ValueError, match="the parameters are not those of the model"):
        TextModel.of(make("t5")[0].model, params, text.tokenizer)
