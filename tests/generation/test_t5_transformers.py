"""T5's greedy and beam search next to transformers' on the parity checkpoints: tokens and scores of a ragged batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxllm.generation import BeamSettings, beam_search, generate
from jaxllm.ops.sampling import Sampling
from tests.parity import t5_cases as cases

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("tests.parity.torch_t5")

# torch and transformers warn about themselves.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

PROMPTS = [row[:n].tolist() for row, n in zip(cases.source(), cases.SOURCE_LENGTHS, strict=True)]
NEW = 12
# So many that beams end early and the rule that stops a search decides about its result.
ENDS = tuple(range(3, 11))
MORE = {"repetition_penalty": 1.4, "min_new_tokens": 3}
NO_REPEATS = {"no_repeat_ngram_size": 2}


def their_rows(built: Any, **options: Any) -> Any:
    """What transformers generates for the batch, padded sources masked; its cache fails for a deeper decoder."""
    cached = built.config.num_decoder_layers <= built.config.num_layers
    batch = {"input_ids": torch.tensor(cases.source()).long(), "attention_mask": torch.tensor(cases.source_mask())}
    options |= {"max_new_tokens": NEW, "do_sample": False, "use_cache": cached, "return_dict_in_generate": True}
    return built.generate(**batch, **options)


def check_row(ours: list[int], row: list[int], pad: int) -> None:
    """The same tokens, and nothing but padding after them."""
    assert row[: len(ours)] == ours
    assert set(row[len(ours) :]) <= {pad}


@pytest.mark.parametrize(
    ("name", "more"),
    [("v1_0_eps_start", {}), ("deep_decoder", {}), ("umt5", {}), ("v1_0_eps_start", MORE), ("umt5", NO_REPEATS)],
)
def test_greedy_is_that_of_transformers(case, name: str, more: dict) -> None:
    model, params, built = case(name)
    sampling = Sampling(**more)
    ours = generate(model, params, PROMPTS, max_new_tokens=NEW, eos_ids=ENDS, pad_id=0, sampling=sampling)
    rows = their_rows(built, eos_token_id=list(ENDS), pad_token_id=0, **more).sequences.tolist()
    for row, want in zip(ours, rows, strict=True):
        check_row(row, want[1:], pad=0)


@pytest.mark.parametrize(
    ("name", "early_stopping", "length_penalty", "more"),
    [
        ("v1_1", True, 1.0, {}),
        ("v1_1", False, 1.0, {}),
        ("v1_1", "never", 1.0, {}),
        ("v1_1", "never", -1.0, {}),
        ("v1_0_eps_start", False, 0.0, MORE),
        ("deep_decoder", True, 2.0, MORE),
        ("deep_decoder", False, 1.0, NO_REPEATS),
        ("umt5", False, 0.8, {}),
    ],
)
def test_beams_are_those_of_transformers(case, name: str, early_stopping, length_penalty: float, more: dict) -> None:
    model, params, built = case(name)
    search = BeamSettings(beams=4, length_penalty=length_penalty, early_stopping=early_stopping, returned=3)
    ours = beam_search(model, params, PROMPTS, max_new_tokens=NEW, search=search, eos_ids=ENDS, **more)
    out = their_rows(
        built,
        num_beams=4,
        num_return_sequences=3,
        eos_token_id=list(ENDS),
        pad_token_id=1,  # transformers takes a padding id of 0 for none and fills with an end token
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        output_scores=True,
        **more,
    )
    beams = [beam for row in ours for beam in row]
    np.testing.assert_allclose([beam.score for beam in beams], out.sequences_scores.numpy(), atol=1e-4)
    for beam, row in zip(beams, out.sequences.tolist(), strict=True):
        check_row(beam.tokens, row[1:], pad=1)
