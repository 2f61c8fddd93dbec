"""Beam search next to exhaustive search, and scoring; next to transformers in `test_{llama,t5}_transformers.py`."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

from jaxllm.config import LlamaConfig
from jaxllm.generation import BeamSettings, beam_search, generate, score
from jaxllm.generation.scoring import score_greedy
from jaxllm.models import build, init_params

CONFIG = LlamaConfig(vocab_size=23, d_model=16, d_ff=24, num_layers=2, num_heads=2, num_kv_heads=1, max_length=64)
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14]]


@pytest.fixture(scope="module")
def model_and_params():
    model = build(CONFIG)
    # Larger than at initialisation: a flat distribution would leave nothing to decide.
    return model, jax.tree.map(lambda x: 6 * x if x.ndim > 1 else x, init_params(model, jax.random.key(0)))


def test_wide_beams_find_the_best_of_all_sequences(model_and_params) -> None:
    model, params = model_and_params
    search = BeamSettings(beams=23, length_penalty=0.0, returned=3)
    beams = beam_search(model, params, PROMPTS[:1], max_new_tokens=2, search=search)[0]
    pairs = [list(pair) for pair in itertools.product(range(23), repeat=2)]
    totals = np.sum(score(model, params, PROMPTS[:1] * len(pairs), pairs), axis=1)
    best = np.argsort(-totals)[:3]
    assert [beam.tokens for beam in beams] == [pairs[i] for i in best]
    np.testing.assert_allclose([beam.score for beam in beams], totals[best], atol=1e-5)


def test_scores_are_log_probabilities_whatever_the_batch(model_and_params) -> None:
    model, params = model_and_params
    given = [[3, 1, 4, 1], [5], [9, 2]]
    got = score(model, params, PROMPTS, given)
    forward = jax.jit(lambda ids: jax.nn.log_softmax(model.apply({"params": params}, ids)))
    for prompt, row, values in zip(PROMPTS, given, got, strict=True):
        ids = np.zeros((1, 10), np.int32)
        ids[0, : len(prompt) + len(row)] = [*prompt, *row]
        logs = np.asarray(forward(ids))[0]
        want = [logs[len(prompt) + i - 1, token] for i, token in enumerate(row)]
        np.testing.assert_allclose(values, want, atol=1e-5)


@pytest.mark.parametrize("wrong", [{"beams": 1}, {"beams": 4, "returned": 5}])
def test_contradictory_searches_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(reversed(wrong)))):
        BeamSettings(**wrong)


def test_bad_continuations_are_refused(model_and_params) -> None:
    model, params = model_and_params
    with pytest.raises(ValueError, match="one continuation"):
        score(model, params, PROMPTS, [[1]])
    with pytest.raises(ValueError, match="continuation 0 needs"):
        score(model, params, [[1]], [[]])


def test_a_greedy_continuation_is_told_apart(model_and_params) -> None:
    model, params = model_and_params
    greedy = generate(model, params, PROMPTS, max_new_tokens=4)
    other = [[*row[:-1], (row[-1] + 1) % 23] for row in greedy]
    for rows, wanted in ((greedy, True), (other, False)):
        scored = score_greedy(model, params, PROMPTS, rows)
        assert [flag for _, flag in scored] == [wanted] * 3
        assert [values for values, _ in scored] == score(model, params, PROMPTS, rows)


def test_each_pair_may_fill_the_context_alone(model_and_params) -> None:
    """The last token of a continuation is predicted, not read."""
    model, params = model_and_params
    prompts, new = [[1] * 60, [2], [3] * 30], [[4] * 5, [5] * 64, [6]]
    alone = [score(model, params, [prompt], [row])[0] for prompt, row in zip(prompts, new, strict=True)]
    for values, want in zip(score(model, params, prompts, new), alone, strict=True):
        np.testing.assert_allclose(values, want, atol=1e-5)
    with pytest.raises(ValueError, match="prompt 1 of 2 tokens and 64 new ones need 65 positions"):
        score(model, params, [[1] * 60, [2, 2], [3]], new)
