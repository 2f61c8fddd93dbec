"""Speculative decoding loses nothing: greedy rows are those of `generate`, samples follow the model's distribution."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import LlamaConfig, T5Config
from jaxllm.generation import generate, generate_speculative
from jaxllm.models import build, decoder_of, init_params
from jaxllm.ops.sampling import Sampling, process

CONFIG = LlamaConfig(vocab_size=11, d_model=16, d_ff=24, num_layers=2, num_heads=2, num_kv_heads=1, max_length=128)
FAMILY = {
    "llama": CONFIG,
    "window": dataclasses.replace(CONFIG, sliding_window=6),
    "t5": T5Config(vocab_size=11, d_model=16, d_ff=24, num_layers=2, num_heads=2, head_dim=8, decoder_start_id=2),
}
PROMPTS = [[5, 6, 7, 5, 6], [8, 9, 10, 1, 2, 3, 8, 9], [4]]


@functools.cache
def make(family: str, seed: int, scale: float) -> tuple[Any, Any]:
    model = build(FAMILY[family])
    return model, jax.tree.map(lambda x: scale * x if x.ndim > 1 else x, init_params(model, jax.random.key(seed)))


def models(family: str, drafting: str) -> tuple[Any, Any, dict[str, Any]]:
    """A model, its parameters and the arguments that say where drafts come from."""
    # Larger than at initialisation, so that there is something to decide; T5 begins with larger ones.
    scale = 2 if family == "t5" else 5
    large, small = make(family, 0, scale), make(family, 1, scale - 0.5)
    draft = {"lookup": None, "other": small, "itself": large}[drafting]
    return *large, {} if draft is None else {"draft_model": draft[0], "draft_params": draft[1]}


@pytest.fixture(scope="module")
def large():
    return make("llama", 0, 5)


@pytest.mark.parametrize("drafting", ["lookup", "other", "itself"])
@pytest.mark.parametrize("family", FAMILY)
def test_greedy_is_identical(family: str, drafting: str) -> None:
    model, params, draft = models(family, drafting)
    want = generate(model, params, PROMPTS, max_new_tokens=40)
    got = generate_speculative(model, params, PROMPTS, max_new_tokens=40, drafts=4, **draft)
    assert got.rows == want
    if drafting == "itself":
        assert got.tokens_per_step > 4.5
    if drafting == "lookup" and family == "llama":
        # A small greedy model soon repeats itself, and then the lookup is right.
        assert got.tokens_per_step > 1.2
    # Ends inside accepted drafts, and none before the least length.
    ends, least = (want[0][7], want[1][2]), Sampling(min_new_tokens=4)
    options = {"max_new_tokens": 40, "eos_ids": ends, "sampling": least}
    stopped = generate(model, params, PROMPTS, **options)
    assert len({len(row) for row in stopped}) > 1
    assert generate_speculative(model, params, PROMPTS, drafts=4, **options, **draft).rows == stopped


def law(model: Any, params: Any, prompt: list[int], sampling: Sampling, ends: tuple[int, ...]) -> np.ndarray:
    """Probability of every three tokens after a prompt, by full forwards over all beginnings [V, V, V]."""
    vocab, decoder = model.config.vocab_size, decoder_of(model)
    rows = vocab**2
    tokens, lengths = jnp.tile(jnp.array([prompt]), (rows, 1)), jnp.full(rows, len(prompt))
    first, second = (x.ravel() for x in np.indices((vocab, vocab)))
    new = jnp.stack([first, second, 0 * first], axis=1)
    logits = jax.jit(decoder.full_logits)(params, tokens, lengths, new)
    seen = np.zeros((rows, vocab), bool)
    seen[:, prompt if model.config.family == "llama" else model.config.decoder_start_id] = True
    steps = []
    for step in range(3):
        banned = jnp.isin(jnp.arange(vocab), jnp.array(ends))[None] & (step < sampling.min_new_tokens)
        kept = process(logits[:, step], sampling, seen=jnp.asarray(seen), banned=banned)
        steps.append(np.asarray(jax.nn.softmax(kept), np.float64).reshape(vocab, vocab, vocab))
        seen[np.arange(rows), np.asarray(new)[:, step]] = True
    return steps[0][0, 0][:, None, None] * steps[1][:, 0][:, :, None] * steps[2]


PENALTY = Sampling(temperature=2.0, repetition_penalty=1.6)
CUT = Sampling(temperature=2.5, top_k=8, top_p=0.9, min_p=0.02, repetition_penalty=0.7, min_new_tokens=2)


@pytest.mark.parametrize(
    ("family", "drafting", "drafts", "sampling"),
    [
        ("llama", "lookup", 2, Sampling(temperature=2.0)),
        ("llama", "other", 2, Sampling(temperature=2.0)),
        ("llama", "itself", 1, Sampling(temperature=2.0)),  # the third token comes after an accepted draft
        ("llama", "lookup", 2, PENALTY),
        ("llama", "other", 2, PENALTY),
        ("llama", "itself", 1, PENALTY),
        ("llama", "other", 2, CUT),
        ("t5", "lookup", 2, PENALTY),
        ("t5", "other", 2, Sampling(temperature=2.0)),
        ("t5", "other", 1, CUT),
    ],
)
def test_samples_follow_the_distribution(family: str, drafting: str, drafts: int, sampling: Sampling) -> None:
    """Chi-square of all pairs of the first two, and of the last two, of three tokens against exact probabilities."""
    model, params, draft = models(family, drafting)
    rows, ends = 16_000, (3,) if sampling.min_new_tokens else ()
    options: dict[str, Any] = {"max_new_tokens": 3, "sampling": sampling, "eos_ids": ends}
    got = generate_speculative(model, params, [PROMPTS[0]] * rows, drafts=drafts, seed=3, **options, **draft).rows
    observed = np.zeros((11, 11, 11))
    np.add.at(observed, tuple(np.array(got).T), 1)
    expected = rows * law(model, params, PROMPTS[0], sampling, ends)
    for summed in (0, 2):
        seen, wanted = observed.sum(axis=summed).ravel(), expected.sum(axis=summed).ravel()
        assert np.all(seen[wanted == 0] == 0)
        # Pairs that are too rare for the approximation count as one.
        rare = wanted < 5
        seen, wanted = (np.append(x[~rare], x[rare].sum()) for x in (seen, wanted))
        statistic, freedom = np.sum((seen - wanted) ** 2 / np.maximum(wanted, 1e-9)), wanted.size - 1
        assert freedom > 30
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
