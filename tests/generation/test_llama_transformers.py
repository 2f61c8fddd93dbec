"""Llama's greedy and beam search next to transformers' on the parity checkpoints: tokens and scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxllm.generation import BeamSettings, beam_search, generate
from jaxllm.ops.sampling import Sampling
from tests.parity import llama_cases as cases

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("tests.parity.torch_llama")

# torch and transformers warn about themselves.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

PROMPTS = [cases.tokens()[row, :length].tolist() for row, length in ((0, 3), (1, 9), (0, 1))]
NEW = 12
# So many that rows end early and the rule that stops a search decides about its result.
ENDS = tuple(range(3, 11))
MORE = {"repetition_penalty": 1.4, "min_new_tokens": 3}
NO_REPEATS = {"no_repeat_ngram_size": 2}


def their_row(built: Any, prompt: list[int], **options: Any) -> Any:
    """What transformers generates for one prompt: alone, since a batch would be padded on the left."""
    options |= {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": list(ENDS), "pad_token_id": 1}
    return built.generate(torch.tensor([prompt]), return_dict_in_generate=True, **options)


@pytest.mark.parametrize(
    "more",
    [{}, MORE, NO_REPEATS, {**MORE, "no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 3}],
    ids=["plain", "penalty and least length", "no pairs", "no token twice", "no triples"],
)
@pytest.mark.parametrize("name", ["mha", "mistral", "qwen3"])
def test_greedy_is_that_of_transformers(case, name: str, more: dict[str, Any]) -> None:
    model, params, built = case(name)
    ours = generate(model, params, PROMPTS, max_new_tokens=NEW, eos_ids=ENDS, sampling=Sampling(**more))
    for prompt, row in zip(PROMPTS, ours, strict=True):
        assert row == their_row(built, prompt, **more).sequences[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("name", "early_stopping", "length_penalty", "more"),
    [
        ("mha", True, 1.0, {}),
        ("mha", False, 1.0, {}),
        ("mha", "never", 1.0, {}),
        ("mha", "never", -1.0, {}),
        ("mistral", False, 0.0, MORE),  # beyond its window
        ("qwen3", True, 2.0, MORE),
        ("biases_yarn_mscale", False, 0.8, {}),
        ("mha", False, 1.0, NO_REPEATS),
    ],
)
def test_beams_are_those_of_transformers(
    case, name: str, early_stopping: bool | str, length_penalty: float, more: dict[str, Any]
) -> None:
    model, params, built = case(name)
    search = BeamSettings(beams=4, length_penalty=length_penalty, early_stopping=early_stopping, returned=3)
    ours = beam_search(model, params, PROMPTS, max_new_tokens=NEW, search=search, eos_ids=ENDS, **more)
    for prompt, beams in zip(PROMPTS, ours, strict=True):
        out = their_row(
            built,
            prompt,
            num_beams=4,
            num_return_sequences=3,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            output_scores=True,
            **more,
        )
        np.testing.assert_allclose([beam.score for beam in beams], out.sequences_scores.numpy(), atol=1e-4)
        for beam, row in zip(beams, out.sequences[:, len(prompt) :].tolist(), strict=True):
            assert row[: len(beam.tokens)] == beam.tokens
            assert set(row[len(beam.tokens) :]) <= {1}
