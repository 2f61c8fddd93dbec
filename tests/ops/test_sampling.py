"""Processors of logits: transformers' own on random logits, ties included, and the invariants of drawing."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.ops.backend import fast_argmax
from jaxllm.ops.sampling import (
    Sampling,
    _gumbel,
    choose,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    process,
    sample,
)

SETTINGS = {
    "plain": {"temperature": 1.0},
    "hot": {"temperature": 1.7},
    "top_k": {"temperature": 1.0, "top_k": 5},
    "top_k_beyond": {"temperature": 0.8, "top_k": 500},
    "top_p": {"temperature": 1.0, "top_p": 0.7},
    "min_p": {"temperature": 1.3, "min_p": 0.1},
    "all": {
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.3,
        "min_new_tokens": 4,
    },
    "greedy": {"repetition_penalty": 0.8, "min_new_tokens": 4},
}


@pytest.mark.parity
@pytest.mark.parametrize("name", list(SETTINGS))
@pytest.mark.parametrize("ties", [False, True])
def test_processors_equal_those_of_transformers(name: str, ties: bool) -> None:
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    settings = SETTINGS[name]
    rng = np.random.default_rng(3)
    logits = 3 * rng.standard_normal((6, 64), np.float32)
    if ties:
        logits = np.round(logits)
    history = rng.integers(0, 64, (6, 9))
    ends = (5, 9)
    # The order in which transformers' generate builds its list.
    chain = processors.LogitsProcessorList()
    if "repetition_penalty" in settings:
        chain.append(processors.RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]))
    if "min_new_tokens" in settings:
        chain.append(processors.MinNewTokensLengthLogitsProcessor(7, settings["min_new_tokens"], list(ends)))
    if "temperature" in settings:
        chain.append(processors.TemperatureLogitsWarper(settings["temperature"]))
    if "top_k" in settings:
        chain.append(processors.TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        chain.append(processors.TopPLogitsWarper(settings["top_p"]))
    if "min_p" in settings:
        chain.append(processors.MinPLogitsWarper(settings["min_p"]))
    want = chain(torch.tensor(history), torch.tensor(logits)).numpy()
    seen = np.zeros((6, 64), bool)
    np.put_along_axis(seen, history, True, axis=1)
    banned = np.isin(np.arange(64), ends)[None] if "min_new_tokens" in settings else None
    got = process(
        jnp.asarray(logits),
        Sampling(**settings),
        seen=jnp.asarray(seen) if "repetition_penalty" in settings else None,
        banned=None if banned is None else jnp.asarray(banned),
    )
    if ties and settings.get("top_p", 1) < 1:
        # Which of equal tokens a cut inside a tie keeps depends on the sort; the values kept do not.
        want, got = np.sort(want, axis=-1), np.sort(got, axis=-1)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 200])
def test_the_most_probable_is_the_first_of_the_largest(vocab: int) -> None:
    """As NumPy's argmax: ties between and inside blocks, and rows of -inf alone."""
    logits = np.random.default_rng(0).integers(0, 4, (3, 40, vocab)).astype(np.float32)
    logits[0, :10] = -np.inf
    np.testing.assert_array_equal(fast_argmax(jnp.asarray(logits)), logits.argmax(axis=-1))
    nowhere = fast_argmax(jnp.full((3, 40, vocab), jnp.nan))
    assert np.all((nowhere >= 0) & (nowhere < vocab))


def test_kept_sets() -> None:
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25]]))
    assert np.isfinite(np.asarray(keep_top_k(logits, 2))).tolist() == [[False, True, True, False], [True] * 4]
    assert np.isfinite(np.asarray(keep_top_p(logits, 0.6)))[0].tolist() == [False, True, True, False]
    assert np.isfinite(np.asarray(keep_top_p(logits, 0.01)))[0].tolist() == [False, True, False, False]
    assert np.isfinite(np.asarray(keep_min_p(logits, 0.7)))[0].tolist() == [False, True, True, False]


def test_draws_follow_the_probabilities() -> None:
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.3, 0.2]]))
    draws = jax.jit(lambda key: sample(jnp.tile(logits, (4000, 1)), key, Sampling(temperature=1.0)))(jax.random.key(0))
    counts = np.bincount(np.asarray(draws), minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.1, 0.4, 0.3, 0.2], atol=0.03)


def test_a_row_draws_with_its_own_key() -> None:
    logits, keys = jax.random.normal(jax.random.key(0), (4, 50)), jax.random.split(jax.random.key(1), 4)
    together = choose(logits, keys, Sampling(temperature=1.0))
    assert int(together[2]) == int(choose(logits[2:3], keys[2:3], Sampling(temperature=1.0))[0])


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_k": 3},
        {"min_p": 0.1},
        {"temperature": 1.0, "min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.nan},
        {"min_new_tokens": -1},
    ],
)
def test_contradictory_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(reversed(wrong)))):
        Sampling(**wrong)


def test_noise_of_a_draw_is_exact_in_both_tails() -> None:
    """The upper one draws tokens of tiny probability: 131071 of 3e-8 each must come together 4 times in 1000."""
    bits = np.array([0, 1, 7, 1000, 2**20, 2**31, 2**32 - 2**20], np.uint32)
    v = (bits.astype(np.float64) + 0.5) / 2**32
    np.testing.assert_allclose(_gumbel(jnp.asarray(bits)), -np.log(-np.log1p(-v)), rtol=1e-5)
    assert np.all(np.isfinite(_gumbel(jnp.array([2**32 - 1, 0], jnp.uint32))))
