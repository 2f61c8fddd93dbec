"""Objectives: T5's table of lengths, the exact distribution of its spans, and an inverse that restores every text."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from jaxllm.data import DataError
from jaxllm.data.objectives import (
    UL2,
    Denoiser,
    Pairs,
    compositions,
    denoise,
    fill_spans,
    join_prefix,
    lengths_of,
    noise_mask,
    noise_of,
    prefix_lm,
    solve_lengths,
    span_corruption,
)
from jaxllm.data.packing import first_fit, pack_pairs, unpack_pairs

EOS = 1
SENTINELS = np.arange(999, 899, -1, dtype=np.int32)
T5 = Denoiser(0.15, 3.0)

# inputs length, density, mean -> raw, inputs, targets: the output of T5's random_spans_helper.
TABLE = {
    (512, 0.15, 3.0): (568, 512, 114),
    (512, 0.15, 8.0): (588, 512, 100),
    (512, 0.15, 64.0): (600, 512, 92),
    (512, 0.5, 3.0): (766, 512, 512),
    (512, 0.5, 64.0): (1006, 512, 512),
    (1024, 0.15, 3.0): (1137, 1024, 229),
    (114, 0.15, 3.0): (126, 114, 26),
}


def examples(pairs: Pairs) -> list[tuple[np.ndarray, np.ndarray]]:
    """Inputs and targets of one example after the other."""
    inputs = np.split(pairs.inputs, np.cumsum(pairs.input_lengths)[:-1])
    targets = np.split(pairs.targets, np.cumsum(pairs.target_lengths)[:-1])
    return list(zip(inputs, targets, strict=True))[: len(pairs.input_lengths)]


@pytest.mark.parametrize("case", TABLE)
def test_lengths_are_the_references(case: tuple[int, float, float]) -> None:
    assert solve_lengths(Denoiser(*case[1:]), inputs=case[0]) == TABLE[case]


def reference_lengths(inputs: int, density: float, mean: float) -> tuple[int, int, int]:
    """The search as T5's code does it, one step at a time."""

    def made(raw: int) -> tuple[int, int]:
        noise = round(raw * density)
        spans = round(noise / mean)
        return raw - noise + spans + 1, noise + spans + 1

    raw = inputs - 1
    while made(raw + 1)[0] <= inputs:
        raw += 1
    targets = made(raw)[1]
    if density == 0.5 and targets > inputs:
        return raw - 1, made(raw)[0], targets - 1
    return raw, made(raw)[0], targets


@settings(max_examples=300, deadline=None)
@given(
    inputs=st.integers(100, 2000),
    density=st.sampled_from([0.1, 0.15, 0.25, 0.3, 0.5]),
    mean=st.sampled_from([2.0, 3.0, 5.0, 8.0]),
)
def test_lengths_are_the_longest_that_fit(inputs: int, density: float, mean: float) -> None:
    denoiser = Denoiser(density, mean)
    found = solve_lengths(denoiser, inputs=inputs)
    raw, _, targets = reference_lengths(inputs, density, mean)
    assert (found.raw, found.targets) == (raw, targets)
    assert found.inputs <= inputs
    both = solve_lengths(denoiser, inputs=inputs, targets=inputs // 4)
    assert both.targets <= inputs // 4 and both.inputs <= inputs
    longer = lengths_of(both.raw + 2, denoiser)
    assert longer.inputs > inputs or longer.targets > inputs // 4


@settings(max_examples=200, deadline=None)
@given(
    length=st.integers(0, 700),
    density=st.floats(0.01, 0.99),
    mean=st.one_of(st.none(), st.floats(1.0, 80.0)),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_span_corruption_is_inverted_exactly(length, density, mean, seed, data) -> None:
    """Any text, ids 0 and the end's id included, any density: the counts hold and the text comes back."""
    denoiser = Denoiser(density, mean)
    rng = np.random.default_rng(seed)
    noise = noise_of(length, denoiser)
    if noise.spans > len(SENTINELS):
        with pytest.raises(DataError, match=f"get {noise.spans} masked spans, the tokenizer has 100 sentinels"):
            span_corruption(rng, np.zeros((1, length), np.int32), denoiser, sentinels=SENTINELS, eos_id=EOS)
        return
    tokens = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 900, (3, length), dtype=np.int32)
    inputs, targets = span_corruption(rng, tokens, denoiser, sentinels=SENTINELS, eos_id=EOS)
    assert (length, inputs.shape[1], targets.shape[1]) == lengths_of(length, denoiser)
    for row in range(3):
        assert inputs[row, -1] == targets[row, -1] == EOS
        marks = targets[row][targets[row] >= 900]
        np.testing.assert_array_equal(marks, SENTINELS[: len(marks)])
        back = fill_spans(inputs[row], targets[row], sentinels=SENTINELS, eos_id=EOS)
        np.testing.assert_array_equal(back, tokens[row])
    again, _ = span_corruption(np.random.default_rng(seed), tokens, denoiser, sentinels=SENTINELS, eos_id=EOS)
    np.testing.assert_array_equal(again, inputs)


def test_mask_begins_kept_ends_hidden_in_exactly_the_spans() -> None:
    mask = noise_mask(np.random.default_rng(0), 200, 568, T5)
    edges = np.diff(mask.astype(np.int8), axis=1, prepend=0)
    assert not mask[:, 0].any() and mask[:, -1].all()
    assert (mask.sum(1) == 85).all() and ((edges == 1).sum(1) == 28).all()


def test_an_example_by_hand() -> None:
    """Half of six tokens at mean 3 is one span, and it must be the end."""
    tokens = np.array([[10, 11, 12, 13, 14, 15]], np.int32)
    rng = np.random.default_rng(0)
    inputs, targets = span_corruption(rng, tokens, Denoiser(0.5, 3.0), sentinels=SENTINELS, eos_id=EOS)
    assert inputs.tolist() == [[10, 11, 12, 999, 1]] and targets.tolist() == [[999, 13, 14, 15, 1]]


@pytest.mark.parametrize(("length", "inputs", "targets"), [(1, [5, 1], [999, 1]), (0, [1], [1])])
def test_shortest_texts(length: int, inputs: list[int], targets: list[int]) -> None:
    tokens = np.full((1, length), 5, np.int32)
    made = span_corruption(np.random.default_rng(0), tokens, T5, sentinels=SENTINELS, eos_id=EOS)
    assert made[0].tolist() == [inputs] and made[1].tolist() == [targets]


@pytest.mark.parametrize("length", range(2, 11))
def test_short_texts_hide_their_end(length: int) -> None:
    mask = noise_mask(np.random.default_rng(0), 4, length, T5)
    hidden = 2 if length == 10 else 1
    np.testing.assert_array_equal(mask, np.tile(np.arange(length) >= length - hidden, (4, 1)))


def law(items: int, parts: int) -> np.ndarray:
    """P(first part = k) for k = 1..: C(items-k-1, parts-2) / C(items-1, parts-1)."""
    sizes = range(1, items - parts + 2)
    return np.array([math.comb(items - k - 1, parts - 2) / math.comb(items - 1, parts - 1) for k in sizes])


@pytest.mark.parametrize(("items", "part"), [(85, 0), (85, 13), (85, 27), (483, 5)])
def test_span_lengths_follow_the_exact_law(items: int, part: int) -> None:
    expected = law(items, 28)
    if items == 85:
        np.testing.assert_allclose(expected[:4], [0.3214, 0.2207, 0.1507, 0.1024], atol=5e-5)
    rows = 40_000
    drawn = compositions(np.random.default_rng(part), rows, items, 28)
    assert (drawn.sum(1) == items).all() and (drawn >= 1).all()
    cut = int(np.argmax(np.cumsum(expected[::-1])[::-1] * rows < 20))  # the tail in one class
    observed = np.bincount(drawn[:, part] - 1, minlength=len(expected))
    joined = [np.append(values[:cut], values[cut:].sum()) for values in (observed, expected * rows)]
    assert chisquare(*joined).pvalue > 1e-4
    if part == 0:  # and not the geometric distribution of independent draws of mean 3
        geometric = (28 / items) * (1 - 28 / items) ** np.arange(cut)
        geometric = np.append(geometric, 1 - geometric.sum()) * rows
        assert chisquare(joined[0], geometric).pvalue < 1e-6


def test_every_composition_is_equally_likely() -> None:
    drawn = compositions(np.random.default_rng(7), 50_000, 7, 4)
    found, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(found) == math.comb(6, 3)
    assert chisquare(counts).pvalue > 1e-4


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 3000), seed=st.integers(0, 1000))
def test_ul2_uses_every_token_once(length: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    text = rng.permutation(np.arange(2, 2 + length)).astype(np.int32)  # each token is its own place
    sentinels = np.arange(20_000, 19_900, -1, dtype=np.int32)
    modes = [np.array([10_000 + i, 10_000], np.int32) for i in range(len(UL2))]
    raw = [solve_lengths(each, inputs=126, targets=128).raw for each in UL2]
    pairs = denoise(rng, text, UL2, raw=raw, modes=modes, sentinels=sentinels, eos_id=EOS)
    batch = pack_pairs(pairs, inputs_length=128, targets_length=128, start_id=0)
    found = np.concatenate([fill_spans(i[2:], t, sentinels=sentinels, eos_id=EOS) for i, t in unpack_pairs(batch)])
    np.testing.assert_array_equal(np.sort(found), np.arange(2, 2 + length))


def test_ul2_draws_all_denoisers_equally() -> None:
    text = np.zeros(400_000, np.int32)
    modes = [np.array([500 + i]) for i in range(len(UL2))]
    pairs = denoise(np.random.default_rng(0), text, UL2, raw=[100] * 7, modes=modes, sentinels=SENTINELS, eos_id=EOS)
    first = pairs.inputs[np.cumsum(pairs.input_lengths) - pairs.input_lengths]
    assert chisquare(np.bincount(first - 500)).pvalue > 1e-4
    sequential = [(i, t) for i, t in examples(pairs) if i[0] == 502]
    for inputs, targets in sequential:
        assert len(inputs) == 1 + 75 + 2 and inputs[-2] == 999 and len(targets) == 25 + 2


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 8), length=st.integers(0, 60), seed=st.integers(0, 1000))
def test_prefix_lm_is_inverted_exactly(rows: int, length: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 900, (rows, length), dtype=np.int32)
    pairs = prefix_lm(rng, tokens, eos_id=EOS)
    for row, (inputs, targets) in enumerate(examples(pairs)):
        assert inputs[-1] == targets[-1] == EOS
        np.testing.assert_array_equal(join_prefix(inputs, targets, eos_id=EOS), tokens[row])
        if length > 1:
            assert len(inputs) > 1 and len(targets) > 1


def test_prefix_lm_cuts_uniformly() -> None:
    pairs = prefix_lm(np.random.default_rng(0), np.zeros((20_000, 11), np.int32), eos_id=EOS)
    assert chisquare(np.bincount(pairs.input_lengths - 2, minlength=10)).pvalue > 1e-4


def test_filling_takes_what_a_model_wrote() -> None:
    inputs = np.array([7, 999, 8, 998, 9, 1])
    for targets, want in (([999, 5, 5, 998, 6, 1], [7, 5, 5, 8, 6, 9]), ([998, 4, 1], [7, 8, 4, 9]), ([3], [7, 8, 9])):
        assert fill_spans(inputs, np.array(targets), sentinels=SENTINELS, eos_id=EOS).tolist() == want


@pytest.mark.parametrize("room", [(1, None), (4, 2)])
def test_rows_too_short_for_anything_are_named(room: tuple[int, int | None]) -> None:
    with pytest.raises(DataError, match=r"no example of .* fits into"):
        solve_lengths(T5, inputs=room[0], targets=room[1])


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=60),
    seed=st.integers(0, 99),
)
def test_packing_keeps_every_example_whole(sizes: list[tuple[int, int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = np.array(sizes)
    sides = [rng.integers(0, 99, total).astype(np.int32) for total in lengths.sum(0)]
    pairs = Pairs(sides[0], lengths[:, 0], sides[1], lengths[:, 1])
    batch = pack_pairs(pairs, inputs_length=20, targets_length=12, start_id=55)
    want = sorted((i.tolist(), t.tolist()) for i, t in examples(pairs))
    assert sorted((i.tolist(), t.tolist()) for i, t in unpack_pairs(batch)) == want
    np.testing.assert_array_equal(batch["weights"], batch["decoder_segment_ids"] > 0)
    for row in range(len(batch["targets"])):
        for segment in range(1, batch["decoder_segment_ids"][row].max() + 1):
            inside = batch["decoder_segment_ids"][row] == segment
            shifted = [55, *batch["targets"][row][inside][:-1]]
            assert batch["decoder_tokens"][row][inside].tolist() == shifted
        for side in ("encoder", "decoder"):
            ids = batch[f"{side}_segment_ids"][row]
            filled = ids[: (ids > 0).sum()]
            assert (np.diff(filled) >= 0).all() and not ids[len(filled) :].any()
            assert not batch[f"{side}_tokens"][row][len(filled) :].any()
    alone = pack_pairs(pairs, inputs_length=20, targets_length=12, start_id=55, alone=True)
    found = [(i.tolist(), t.tolist()) for i, t in unpack_pairs(alone)]
    assert sorted(found) == want
    filled = [max(len(i) / 20, len(t) / 12) for i, t in found]
    assert filled == sorted(filled, reverse=True)  # the rest of a text comes last, as it does in packed rows
    assert not (set(batch) ^ set(alone)) - {"encoder_lengths", "encoder_segment_ids", "decoder_segment_ids"}
    assert (alone["decoder_tokens"][:, 0] == 55).all() and len(alone["targets"]) == len(lengths)


def test_packing_uses_few_rows_and_refuses_what_cannot_fit() -> None:
    sizes = np.array([[6, 2], [4, 6], [5, 4], [5, 4]])
    assert len(set(first_fit(sizes, np.array([10, 8])).tolist())) == 2
    pairs = Pairs(np.zeros(11, np.int32), np.array([11]), np.zeros(2, np.int32), np.array([2]))
    with pytest.raises(DataError, match=r"11 inputs or 2 targets does not fit a row of 10 and 8"):
        pack_pairs(pairs, inputs_length=10, targets_length=8, start_id=0)
