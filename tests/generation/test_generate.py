"""Decoding with the cache equals full forwards, row by row, to the last slot."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import LlamaConfig
from jaxllm.generation import generate
from jaxllm.models import build, init_params
from jaxllm.models.llama import prepare_for_decode
from jaxllm.ops.sampling import Sampling, keep_top_k, keep_top_p, sample
from tests.conftest import TOLERANCE

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14]]


@pytest.fixture(params=["plain", "window", "qk_norm_tied"])
def model_and_params(request: pytest.FixtureRequest, tiny: LlamaConfig):
    changes = {
        "plain": {},
        "window": {"sliding_window": 4},
        "qk_norm_tied": {"qk_norm": True, "tie_embeddings": True},
    }
    model = build(dataclasses.replace(tiny, **changes[request.param]))
    return model, init_params(model, jax.random.key(0))


def greedy_without_cache(model, params, prompt: list[int], steps: int) -> list[int]:
    ids = list(prompt)
    for _ in range(steps):
        logits = model.apply({"params": params}, jnp.array([ids]))
        ids.append(int(jnp.argmax(logits[0, -1])))
    return ids[len(prompt) :]


def test_cached_equals_uncached_and_rows_equal_themselves_alone(model_and_params) -> None:
    model, params = model_and_params
    together = generate(model, params, PROMPTS, max_new_tokens=8)
    for prompt, row in zip(PROMPTS, together, strict=True):
        assert row == greedy_without_cache(model, params, prompt, 8)
        assert row == generate(model, params, [prompt], max_new_tokens=8)[0]


def test_logits_agree_at_every_step_to_the_last_slot(model_and_params) -> None:
    model, params = model_and_params
    ids = jax.random.randint(jax.random.key(3), (2, 12), 0, 97)
    want = model.apply({"params": params}, ids)
    variables = {"params": prepare_for_decode(params, dtype=jnp.float32)}
    lengths = jnp.array([4, 4])
    logits, cache = model.apply(variables, ids[:, :4], lengths, capacity=12, method="prefill")
    step = jax.jit(lambda c, t, p: model.apply(variables, c, t, p, method="decode_step"), donate_argnums=0)
    for t in range(4, 12):
        np.testing.assert_allclose(logits, want[:, t - 1], atol=TOLERANCE["float32"])
        logits, cache = step(cache, ids[:, t], jnp.full(2, t))
    np.testing.assert_allclose(logits, want[:, 11], atol=TOLERANCE["float32"])
    assert int(cache.slot) == 12


def test_decode_step_copies_no_cache(tiny: LlamaConfig) -> None:
    """Donated cache buffers are all reused, and no instruction copies one."""
    model = build(tiny)
    params = prepare_for_decode(init_params(model, jax.random.key(0)), dtype=jnp.float32)
    _, cache = model.apply({"params": params}, jnp.ones((1, 4), int), jnp.array([4]), capacity=64, method="prefill")
    step = jax.jit(lambda p, c, t, q: model.apply({"params": p}, c, t, q, method="decode_step"), donate_argnums=1)
    compiled = step.lower(params, cache, jnp.array([1]), jnp.array([4])).compile()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert compiled.memory_analysis().alias_size_in_bytes == held
    copies = [line for line in compiled.as_text().splitlines() if " copy(" in line and "f32[1,2,64,8]" in line]
    assert not copies


def test_end_token_finishes_a_row(model_and_params) -> None:
    model, params = model_and_params
    free = generate(model, params, PROMPTS[:2], max_new_tokens=8)
    end = free[0][3]
    stopped = generate(model, params, PROMPTS[:2], max_new_tokens=8, eos_ids=(end,))
    assert stopped[0] == free[0][: free[0].index(end) + 1]
    want = free[1][: free[1].index(end) + 1] if end in free[1] else free[1]
    assert stopped[1] == want


def test_seeds_decide_samples(tiny: LlamaConfig) -> None:
    model = build(tiny)
    params = init_params(model, jax.random.key(0))

    def draw(seed):
        sampling = Sampling(temperature=1.5)
        return generate(model, params, PROMPTS, max_new_tokens=12, sampling=sampling, seed=seed)

    assert draw(1) == draw(1) != draw(2)


def test_processors() -> None:
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25]]))
    assert np.isfinite(np.asarray(keep_top_k(logits, 2))).tolist() == [[False, True, True, False], [True] * 4]
    assert np.isfinite(np.asarray(keep_top_p(logits, 0.6)))[0].tolist() == [False, True, True, False]
    assert np.isfinite(np.asarray(keep_top_p(logits, 0.01)))[0].tolist() == [False, True, False, False]
    keys = jax.random.split(jax.random.key(0), 4000)
    draws = jax.vmap(lambda k: sample(logits, k, Sampling(temperature=1.0)))(keys)
    counts = np.bincount(np.asarray(draws[:, 0]), minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.1, 0.4, 0.3, 0.2], atol=0.03)


@pytest.mark.parametrize(
    ("prompts", "arguments", "message"),
    [
        ([[]], {}, "at least one token"),
        ([], {}, "at least one token"),
        ([[97]], {}, "outside 0..96"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    ],
)
def test_bad_requests_are_refused(tiny: LlamaConfig, prompts, arguments, message: str) -> None:
    model = build(tiny)
    params = init_params(model, jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        generate(model, params, prompts, **{"max_new_tokens": 2, **arguments})


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_k": 3}])
def test_contradictory_sampling_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"temperature|top_k|top_p"):
        Sampling(**wrong)
