"""Speculative decoding loses nothing: greedy rows are those of `generate`, samples follow the model's distribution."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

from jaxllm.config import LlamaConfig
from jaxllm.generation import generate, generate_speculative, score
from jaxllm.models import build, init_params
from jaxllm.ops.sampling import Sampling

CONFIG = LlamaConfig(vocab_size=11, d_model=16, d_ff=24, num_layers=2, num_heads=2, num_kv_heads=1, max_length=128)
PROMPTS = [[5, 6, 7, 5, 6], [8, 9, 10, 1, 2, 3, 8, 9], [4]]


def make(seed: int, scale: float):
    model = build(CONFIG)
    return model, jax.tree.map(lambda x: scale * x if x.ndim > 1 else x, init_params(model, jax.random.key(seed)))


@pytest.fixture(scope="module")
def large():
    return make(0, 5)


@pytest.fixture(scope="module")
def small():
    return make(1, 4)


@pytest.mark.parametrize("drafting", ["lookup", "other", "itself"])
def test_greedy_is_identical(large, small, drafting: str) -> None:
    model, params = large
    draft = {"lookup": None, "other": small, "itself": large}[drafting]
    arguments = {} if draft is None else {"draft_model": draft[0], "draft_params": draft[1]}
    arguments |= {"max_new_tokens": 40, "drafts": 4}
    want = generate(model, params, PROMPTS, max_new_tokens=40)
    got = generate_speculative(model, params, PROMPTS, **arguments)
    assert got.rows == want
    if drafting == "itself":
        assert got.tokens_per_step > 4.5
    if drafting == "lookup":
        # A small greedy model soon repeats itself, and then the lookup is right.
        assert got.tokens_per_step > 1.2
        ends = (want[0][7],)
        stopped = generate_speculative(model, params, PROMPTS, eos_ids=ends, **arguments)
        assert stopped.rows == generate(model, params, PROMPTS, max_new_tokens=40, eos_ids=ends)


@pytest.mark.parametrize("drafting", ["lookup", "other"])
def test_samples_follow_the_distribution(large, small, drafting: str) -> None:
    """Chi-square of the last two of three tokens over all pairs, at another temperature than 1."""
    model, params = large
    draft = {} if drafting == "lookup" else {"draft_model": small[0], "draft_params": small[1]}
    rows = 4000
    sampling = Sampling(temperature=2.0)
    got = generate_speculative(
        model, params, [PROMPTS[0]] * rows, max_new_tokens=3, drafts=2, sampling=sampling, seed=3, **draft
    ).rows
    vocab = CONFIG.vocab_size
    triples = [list(t) for t in itertools.product(range(vocab), repeat=3)]
    # Probabilities at temperature 2, from log-probabilities of every token at every step.
    prefixes = [[a, b] for a in range(vocab) for b in range(vocab)]
    logs = np.array(score(model, params, [PROMPTS[0]] * len(triples), triples)).reshape(vocab, vocab, vocab, 3)
    steps = [logs[:, 0, 0, 0], logs[:, :, 0, 1], logs[:, :, :, 2]]
    tempered = [np.exp(x / 2) / np.exp(x / 2).sum(axis=-1, keepdims=True) for x in steps]
    joint = tempered[0][:, None, None] * tempered[1][:, :, None] * tempered[2]
    expected = rows * joint.sum(axis=0).reshape(-1)
    observed = np.bincount([b * vocab + c for _, b, c in got], minlength=len(prefixes))
    assert expected.min() >= 5
    statistic, freedom = np.sum((observed - expected) ** 2 / expected), expected.size - 1
    # Wilson and Hilferty's approximation of the 99.99 % quantile.
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.72 * np.sqrt(2 / (9 * freedom))) ** 3


def test_a_repetition_penalty_counts_drafts_as_said(large) -> None:
    """Short prompts leave most ids unseen; the model's own drafts are then penalised by drafts before them."""
    model, params = large
    prompts, sampling = [[5], [8], [4], [1], [10]], Sampling(repetition_penalty=1.3)
    want = generate(model, params, prompts, max_new_tokens=12, sampling=sampling)
    assert want != generate(model, params, prompts, max_new_tokens=12)
    itself = {"draft_model": model, "draft_params": params}
    got = generate_speculative(model, params, prompts, max_new_tokens=12, drafts=4, sampling=sampling, **itself)
    assert got.rows == want
    assert got.tokens_per_step > 3.5  # of 11 tokens after the first, in 3 steps
    assert generate_speculative(model, params, prompts, max_new_tokens=12, sampling=sampling).rows == want


def test_penalised_samples_are_those_of_generate(large, small) -> None:
    """Chi-square of two samples, over pairs of the last two of three tokens."""
    warm = {"max_new_tokens": 3, "sampling": Sampling(temperature=2.0, repetition_penalty=1.5)}
    prompts, vocab = [PROMPTS[0]] * 4000, CONFIG.vocab_size
    draft = {"draft_model": small[0], "draft_params": small[1], "drafts": 2, "seed": 3}
    sides = generate(*large, prompts, **warm), generate_speculative(*large, prompts, **warm, **draft).rows
    left, right = (np.bincount([b * vocab + c for _, b, c in side], minlength=vocab**2) for side in sides)
    common = left + right >= 10
    statistic = np.sum((left - right)[common] ** 2 / (left + right)[common])
    freedom = int(np.sum(common)) - 1
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.72 * np.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"drafts": 0}, "drafts must be at least 1"),
        ({"draft_params": {}}, "go together"),
        (
            {
                "draft_model": build(LlamaConfig(vocab_size=12, d_model=8, d_ff=8, num_layers=1, num_heads=1)),
                "draft_params": {},
            },
            "both must agree",
        ),
    ],
)
def test_bad_requests_are_refused(large, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_speculative(*large, PROMPTS, max_new_tokens=2, **arguments)
