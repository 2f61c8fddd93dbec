"""All of decoding on T5, which shares the loop, samples, beams and scores with Llama."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from jaxllm.config import T5Config
from jaxllm.generation import (
    BeamSettings,
    beam_search,
    generate,
    generate_stream,
    loop,
    score,
)
from jaxllm.models import build, init_params
from jaxllm.ops.sampling import Sampling
from tests.generation.uncached import generate_checked

# A decoder deeper than the encoder, which transformers can't decode, and a start token that is not the padding.
CONFIG = T5Config(
    vocab_size=37,
    d_model=16,
    d_ff=24,
    num_layers=1,
    num_decoder_layers=2,
    num_heads=2,
    head_dim=8,
    relative_buckets=8,
    relative_max_distance=20,
    decoder_start_id=5,
)
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14]]


def make(config: T5Config):
    model = build(config)
    rng = np.random.default_rng(1)
    params = init_params(model, jax.random.key(0))
    return model, jax.tree.map(lambda x: x + 0.2 * rng.standard_normal(x.shape, np.float32), params)


@pytest.fixture(scope="module")
def model_and_params():
    return make(CONFIG)


@pytest.mark.parametrize(
    "changes",
    [{}, {"relative_per_layer": True}, {"tie_embeddings": True, "scale_logits": True, "gated": False}],
    ids=["v1.1", "umt5", "v1.0"],
)
def test_every_step_equals_a_full_forward_and_rows_equal_themselves_alone(changes: dict) -> None:
    model, params = make(dataclasses.replace(CONFIG, **changes))
    together = generate_checked(model, params, PROMPTS, max_new_tokens=12)
    # A second batch through the same programs: nothing of the first one's encoder is left.
    assert generate_checked(model, params, PROMPTS[::-1], max_new_tokens=12) == together[::-1]
    if not changes:
        assert generate(model, params, PROMPTS, max_new_tokens=12) == together
        assert generate(model, params, PROMPTS[1:2], max_new_tokens=12) == together[1:2]


def test_streams_samples_and_int8(model_and_params) -> None:
    model, params = model_and_params
    pieces = list(generate_stream(model, params, PROMPTS, max_new_tokens=40))
    rows = [[token for piece in pieces for token in piece[i]] for i in range(3)]
    assert rows == generate(model, params, PROMPTS, max_new_tokens=40)
    warm = Sampling(temperature=1.0, repetition_penalty=1.2)
    options = {"max_new_tokens": 8, "sampling": warm, "samples": 2, "cache_dtype": "int8"}
    together = generate(model, params, PROMPTS, seed=[3, 4, 5], **options)
    assert together[2:4] == generate(model, params, PROMPTS[1:2], seed=[4], **options)


def test_beams_score_as_the_model_does(model_and_params) -> None:
    model, params = model_and_params
    search = BeamSettings(beams=3, length_penalty=0.0, returned=2)
    found = beam_search(model, params, PROMPTS, max_new_tokens=6, search=search, eos_ids=(1,))
    for i in range(2):
        totals = [sum(row) for row in score(model, params, PROMPTS, [beams[i].tokens for beams in found])]
        np.testing.assert_allclose([beams[i].score for beams in found], totals, atol=1e-4)


def test_the_pad_id_may_be_a_token_of_the_prompt(model_and_params) -> None:
    model, params = model_and_params
    for prompt in ([0], [5, 0, 0]):
        found = [generate(model, params, [prompt, [7] * 5], max_new_tokens=4, pad_id=pad_id)[0] for pad_id in (0, 3)]
        assert found[0] == found[1]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[]], "prompt 0 needs at least one token"),
        ([[37]], "outside 0..36"),
    ],
)
def test_bad_inputs_are_refused_before_compilation(model_and_params, prompts, message: str) -> None:
    model, params = model_and_params
    before = loop.run._cache_size()
    with pytest.raises(ValueError, match=message):
        generate(model, params, prompts, max_new_tokens=2)
    assert loop.run._cache_size() == before


def test_the_cross_cache_is_neither_carried_nor_copied(model_and_params) -> None:
    from jaxllm.generation.requests import make_request

    model, params = model_and_params
    r = make_request(model, params, PROMPTS[:2], max_new_tokens=32)
    arrays = r.params, r.tokens, r.lengths, r.keys
    context, state = loop.begin(r.decoder, r.settings, *arrays)
    assert context.keys[0].shape == (2, 2, 16, 8) and state.cache.keys[0].shape == (4, 33, 8)
    lowered = loop.next_chunk.lower(r.decoder, r.settings, r.params, context, state, np.zeros(2, bool), 33)
    compiled = lowered.compile()
    assert compiled.memory_analysis().alias_size_in_bytes == sum(x.nbytes for x in jax.tree.leaves(state))
    copies = [line for line in compiled.as_text().splitlines() if " copy(" in line]
    assert not [line for line in copies if "f32[2,2,33,8]" in line or "f32[2,2,16,8]" in line]
