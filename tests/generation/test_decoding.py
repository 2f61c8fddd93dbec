"""The decoding loop: cached equals uncached, rows equal themselves alone, nothing is copied or compiled twice."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import LlamaConfig, RopeConfig
from jaxllm.generation import generate, generate_stream, loop
from jaxllm.generation.requests import bucket, make_request
from jaxllm.models import build, init_params
from jaxllm.models.llama import decode as llama_decode
from jaxllm.ops.sampling import Sampling
from tests.conftest import TOLERANCE
from tests.generation.uncached import check_steps, full_logits, generate_checked
from tests.structure.programs import dot_flops

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14]]
CONFIG = LlamaConfig(vocab_size=97, d_model=32, d_ff=48, num_layers=2, num_heads=4, num_kv_heads=2, max_length=512)
FAMILY = {
    "plain": {},
    "window": {"sliding_window": 4},
    "everything": {"qk_norm": True, "tie_embeddings": True, "qkv_bias": True, "out_bias": True, "mlp_bias": True},
}


def make(**changes):
    model = build(dataclasses.replace(CONFIG, **changes))
    params = init_params(model, jax.random.key(0))
    # Initial biases and norms are zeros and ones, which would hide a mistake.
    rng = np.random.default_rng(1)
    return model, jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), params)


@pytest.fixture(scope="module", params=list(FAMILY))
def variant(request: pytest.FixtureRequest):
    return make(**FAMILY[request.param])


@pytest.fixture(scope="module")
def plain():
    return make()


def greedy_without_cache(model, params, prompts, steps: int, *, length: int | None = None) -> list[list[int]]:
    """Full forwards over right-padded rows of one fixed width."""
    forward = jax.jit(lambda ids: model.apply({"params": params}, ids, length=length))
    ids = np.zeros((len(prompts), max(map(len, prompts)) + steps), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    for step in range(steps):
        logits = np.asarray(forward(ids))
        for row, prompt, scores in zip(ids, prompts, logits, strict=True):
            row[len(prompt) + step] = scores[len(prompt) + step - 1].argmax()
    return [row[len(p) : len(p) + steps].tolist() for row, p in zip(ids, prompts, strict=True)]


def test_cached_equals_uncached_and_rows_equal_themselves_alone(variant) -> None:
    model, params = variant
    together = generate_checked(model, params, PROMPTS, max_new_tokens=8)
    assert together == greedy_without_cache(model, params, PROMPTS, 8)
    assert together == [generate(model, params, [prompt], max_new_tokens=8)[0] for prompt in PROMPTS]
    full = [list(range(1, 17)), [7] * 9]  # the first leaves no column of its bucket and no slot of the cache empty
    assert generate_checked(model, params, full, max_new_tokens=8) == greedy_without_cache(model, params, full, 8)


def test_the_whole_context_can_be_used() -> None:
    model, params = make(max_length=24)
    prompts = [list(range(1, 14))]
    want = greedy_without_cache(model, params, prompts, 12)
    assert generate_checked(model, params, prompts, max_new_tokens=12) == want  # the last token is never fed
    with pytest.raises(ValueError, match="25 positions, the model's context has 24"):
        generate(model, params, prompts, max_new_tokens=13)


def test_the_comparison_names_the_step_that_differs(plain, monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = plain
    request = make_request(model, params, PROMPTS, max_new_tokens=4)
    tokens = np.array(generate(model, params, PROMPTS, max_new_tokens=4))
    logits = full_logits(request, params, tokens)
    check_steps(request, params, tokens, logits)
    for wrong in (np.inf, np.nan, 0.01):
        changed = logits.copy()
        changed[1, 2, 50] += wrong
        with pytest.raises(AssertionError, match=r"row 1, new token 2: logits differ from a full forward"):
            check_steps(request, params, tokens, changed)
    jax.clear_caches()
    step = llama_decode.decode_step
    monkeypatch.setattr(llama_decode, "decode_step", lambda c, p, k, t, n, **sizes: step(c, p, k, t, n + 1, **sizes))
    with pytest.raises(AssertionError, match="differ from a full forward"):
        generate_checked(model, params, PROMPTS, max_new_tokens=4)
    jax.clear_caches()


STRETCHED = {
    "dynamic": (8, RopeConfig(type="dynamic", factor=4.0)),
    "longrope": (
        32,
        RopeConfig(type="longrope", original_max_length=8, short_factor=(1.0,) * 4, long_factor=(1.0, 3.0, 5.0, 9.0)),
    ),
}


@pytest.mark.parametrize("kind", STRETCHED)
def test_stretched_rope_assumes_one_length_for_a_whole_generation(kind: str) -> None:
    """The positions that prompt and new tokens need; from the first token on, also while the text is still short."""
    max_length, rope = STRETCHED[kind]
    model, params = make(max_length=max_length, rope=rope)
    prompts = [PROMPTS[0]]
    for new, length in ((6, 8), (21, 23)):
        ours = generate_checked(model, params, prompts, max_new_tokens=new)
        assert ours == greedy_without_cache(model, params, prompts, new, length=length)
    assert ours != greedy_without_cache(model, params, prompts, new, length=8)


def test_logits_agree_at_every_step_to_the_last_slot_and_for_a_second_batch(plain) -> None:
    """Also the entry points themselves: prefill and decode_step."""
    model, params = plain
    prepared = llama_decode.prepare_for_decode(params, dtype=jnp.float32)
    full = jax.jit(lambda ids: model.apply({"params": params}, ids))
    prefill = jax.jit(lambda ids: llama_decode.prefill(model, prepared, ids, jnp.array([4, 4]), capacity=12))
    step = jax.jit(lambda c, t, p: llama_decode.decode_step(model, prepared, c, t, p), donate_argnums=0)
    close = functools.partial(np.testing.assert_allclose, atol=TOLERANCE["float32"])
    for seed in (3, 4):
        ids = jax.random.randint(jax.random.key(seed), (2, 12), 0, 97)
        want = full(ids)
        logits, cache = prefill(ids[:, :4])
        for t in range(4, 12):
            close(logits, want[:, t - 1])
            logits, cache = step(cache, ids[:, t], jnp.full(2, t))
        close(logits, want[:, 11])
        assert int(cache.slot) == 12


def test_a_ring_is_as_short_as_the_window_and_keeps_positions() -> None:
    model, params = make(sliding_window=16)
    for prompts in ([list(range(1, 41)), [7, 8], list(range(30, 10, -1))], [[7, 8], [5] * 11]):
        request = make_request(model, params, prompts, max_new_tokens=24)
        assert request.settings.plan.slots == 16
        generate_checked(model, params, prompts, max_new_tokens=24)


def test_attention_reads_a_power_of_two_of_the_slots(plain, monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = plain
    request = make_request(model, params, [[1]], max_new_tokens=400)
    assert loop.read_lengths(request.settings.plan, 32) == [(256, 224), (528, 512)]
    monkeypatch.setattr(loop, "_LEAST_ATTENDED", 24)
    assert len(loop.read_lengths(make_request(model, params, PROMPTS, max_new_tokens=40).settings.plan, 32)) == 2
    generate_checked(model, params, PROMPTS, max_new_tokens=40)


@pytest.mark.parametrize("layout", ["cache", "weights"])
def test_int8_stays_close(plain, layout: str) -> None:
    model, params = plain
    prepare = functools.partial(llama_decode.prepare_for_decode, params, dtype=jnp.float32)
    ids, lengths = jax.random.randint(jax.random.key(3), (2, 12), 0, 97), jnp.array([8, 8])

    @jax.jit
    def run(prepared, dtype_of_cache):
        _, cache = llama_decode.prefill(model, prepared, ids[:, :8], lengths, capacity=12, dtype=dtype_of_cache.dtype)
        return llama_decode.decode_step(model, prepared, cache, ids[:, 8], lengths)[0]

    want = run(prepare(), jnp.zeros((), jnp.float32))
    got = run(prepare(int8=layout == "weights"), jnp.zeros((), jnp.int8 if layout == "cache" else jnp.float32))
    error = np.abs(np.asarray(got - want)).max() / np.asarray(want).std()
    assert 0 < error < 0.05
    if layout == "cache":
        assert len(generate(model, params, PROMPTS, max_new_tokens=4, cache_dtype="int8")[0]) == 4


def shapes_of(operation: str, text: str) -> list[tuple[int, ...]]:
    """Of the results of one kind of operation in compiled code."""
    found = re.findall(rf"= \w+\[([\d,]+)\]\S* {operation}\(", text)
    return [tuple(map(int, shape.split(","))) for shape in found]


@pytest.mark.parametrize("prompts", [[[1, 2]], [[1, 2], [3, 4]]], ids=["one row", "two rows"])
def test_decoding_copies_no_cache(plain, prompts: list[list[int]]) -> None:
    """A chunk reuses every donated buffer; neither it nor a whole generation copies an array of the cache's size."""
    model, params = plain
    request = make_request(model, params, prompts, max_new_tokens=64, sampling=Sampling(temperature=1.0))
    arrays = request.params, request.tokens, request.lengths, request.keys
    context, state = loop.begin(request.decoder, request.settings, *arrays)
    stopped = np.zeros(len(prompts), bool)
    chunk = loop.next_chunk.lower(request.decoder, request.settings, arrays[0], context, state, stopped, 80)
    whole = loop.run.lower(request.decoder, request.settings, *arrays, 64)
    compiled = chunk.compile()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes == held
    stored = state.cache.keys[0]
    assert stored.shape == (2 * len(prompts), 80, 8)
    for text in (compiled.as_text(), whole.compile().as_text()):
        assert stored.shape in shapes_of("get-tuple-element", text)  # what the loop carries
        assert stored.size not in map(math.prod, shapes_of("copy", text))


def test_sizes_are_rounded_to_few() -> None:
    assert [bucket(n, 4) for n in (1, 4, 5, 9, 13, 17, 25, 33)] == [4, 4, 8, 12, 16, 24, 32, 48]


def test_end_tokens_finish_rows(plain) -> None:
    model, params = plain
    free = generate(model, params, PROMPTS, max_new_tokens=8)
    ends = (free[0][3], free[1][5])
    cut = [row[: min([row.index(end) for end in ends if end in row], default=7) + 1] for row in free]
    assert generate(model, params, PROMPTS, max_new_tokens=8, eos_ids=ends) == cut
    late = generate(model, params, PROMPTS, max_new_tokens=8, eos_ids=ends, sampling=Sampling(min_new_tokens=6))
    assert all(not set(row[:6]) & set(ends) for row in late)


def test_a_stream_is_the_same_in_pieces(plain) -> None:
    model, params = plain
    want = generate(model, params, PROMPTS, max_new_tokens=70, eos_ids=(3,))
    pieces = list(generate_stream(model, params, PROMPTS, max_new_tokens=70, eos_ids=(3,)))
    assert len(pieces) == 3
    assert [list(itertools.chain(*rows)) for rows in zip(*pieces, strict=True)] == want


@pytest.mark.parametrize("last", [31, 40], ids=["between two chunks", "inside a chunk"])
def test_stop_strings_cut_after_the_token_that_completes_one(plain, last: int) -> None:
    model, params = plain

    def decode(ids: list[int]) -> str:
        return "".join(f"<{i}>" for i in ids)

    warm = Sampling(temperature=1.0)  # greedy rows soon repeat themselves, and the string with them
    draw = functools.partial(generate, model, params, PROMPTS, max_new_tokens=64, sampling=warm)
    free = draw()
    text = f"{free[0][last]}><{free[0][last + 1]}"
    assert text not in decode(free[0][: last + 1])
    options = {"stop": ("never", text), "decode": decode}
    stopped = draw(**options)
    assert stopped[0] == free[0][: last + 2]
    assert all(row == whole or text in decode(row) for row, whole in zip(stopped, free, strict=True))
    pieces = list(generate_stream(model, params, PROMPTS, max_new_tokens=64, sampling=warm, **options))
    assert [list(itertools.chain(*rows)) for rows in zip(*pieces, strict=True)] == stopped
    alone = list(generate_stream(model, params, PROMPTS[:1], max_new_tokens=96, sampling=warm, **options))
    assert len(alone) == 2  # a third chunk would be computed for nothing


def test_the_prompt_is_read_once_for_all_samples(plain) -> None:
    model, params = plain
    products = []
    for samples in (1, 5):
        warm = Sampling(temperature=1.0)
        r = make_request(model, params, PROMPTS, max_new_tokens=8, sampling=warm, samples=samples)
        traced = loop.begin.trace(r.decoder, r.settings, r.params, r.tokens, r.lengths, r.keys)
        products.append(dot_flops(traced.jaxpr.jaxpr))
    assert products[0] == products[1] > 0


def test_samples_depend_on_their_seed_and_not_on_batch_mates(plain) -> None:
    model, params = plain
    warm = Sampling(temperature=1.5, top_k=50, top_p=0.95, min_p=0.001, repetition_penalty=1.1)
    draw = functools.partial(generate, model, params, max_new_tokens=12, sampling=warm)
    first, again, other = (draw(prompts=PROMPTS, seed=seed, samples=2) for seed in (1, 1, 2))
    assert first == again != other
    together = draw(prompts=PROMPTS, seed=[7, 8, 9], samples=2)
    assert len(together) == 6 and together[0] != together[1]
    assert together[2:4] == draw(prompts=[PROMPTS[1]], seed=[8], samples=2)


@pytest.mark.parametrize(
    ("prompts", "arguments", "message"),
    [
        ([[1], []], {}, "prompt 1 needs at least one token"),
        ([], {}, "at least one prompt"),
        ([[1], [97]], {}, "prompt 1 has ids outside 0..96: 97..97"),
        ([[-1]], {}, "outside 0..96: -1..-1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be from 1 to 1000000, got 0"),
        ([[1] * 510], {"max_new_tokens": 4}, "513 positions, the model's context has 512"),
        ([[1]], {"eos_ids": (97,)}, "eos_ids and pad_id must be in"),
        ([[1]], {"samples": 2}, "greedy samples"),
        ([[1]], {"samples": 0}, "samples must be at least 1"),
        ([[1]], {"sampling": Sampling(min_new_tokens=3)}, "exceeds max_new_tokens"),
        ([[1]], {"stop": ("x",)}, "stop strings need `decode`"),
        ([[1]], {"stop": "x"}, "sequence of non-empty strings"),
        ([[1]], {"cache_dtype": "float16"}, "cache_dtype must be int8"),
        ([[1]], {"seed": [1, 2]}, "one per prompt"),
        ([[1]], {"seed": -1}, r"seed must be a whole number in 0\.\."),
        ([[1]], {"seed": [2**32]}, r"seed must be a whole number in 0\.\."),
    ],
)
def test_bad_requests_are_refused_before_compilation(plain, prompts, arguments, message: str) -> None:
    model, params = plain
    before = loop.run._cache_size(), loop.begin._cache_size()
    with pytest.raises(ValueError, match=message):
        generate(model, params, prompts, **{"max_new_tokens": 2, **arguments})
    assert (loop.run._cache_size(), loop.begin._cache_size()) == before
