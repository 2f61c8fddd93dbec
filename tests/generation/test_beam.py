"""Beam search beside transformers' on the same random weights and beside exhaustive search; scoring."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

from jaxllm.config import LlamaConfig
from jaxllm.generation import BeamSettings, beam_search, generate, score
from jaxllm.models import build, init_params

CONFIG = LlamaConfig(vocab_size=23, d_model=16, d_ff=24, num_layers=2, num_heads=2, num_kv_heads=1, max_length=64)
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14]]


@pytest.fixture(scope="module")
def model_and_params():
    model = build(CONFIG)
    # Larger than at initialisation: a flat distribution would leave nothing to decide.
    return model, jax.tree.map(lambda x: 6 * x if x.ndim > 1 else x, init_params(model, jax.random.key(0)))


@pytest.fixture(scope="module")
def reference(model_and_params):
    """The same weights in transformers."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    c, params = CONFIG, model_and_params[1]
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.d_model,
            intermediate_size=c.d_ff,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads,
            rms_norm_eps=c.norm_eps,
        )
    )
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}
    state = {}
    for name in model.state_dict():
        parts = name.removeprefix("model.").split(".")
        if parts[0] == "layers":
            leaf = params["layers"][names.get(parts[2], parts[3])]
            value = leaf["weight"][int(parts[1])] if parts[2] in names else leaf["kernel"][int(parts[1])].T
        else:
            value = {
                "embed_tokens": params["embed"],
                "norm": params["final_norm"]["weight"],
                "lm_head": params["lm_head"],
            }[parts[0]]
        state[name] = torch.tensor(np.array(value))
    model.load_state_dict(state)
    return torch, model.eval()


@pytest.mark.parity
@pytest.mark.parametrize(
    ("early_stopping", "length_penalty", "more"),
    [
        (True, 1.0, {}),
        (False, 1.0, {}),
        ("never", 1.0, {}),
        ("never", -1.0, {}),
        (False, 0.0, {"repetition_penalty": 1.4, "min_new_tokens": 3}),
        (True, 2.0, {"repetition_penalty": 1.4, "min_new_tokens": 3}),
    ],
)
def test_tokens_and_scores_equal_those_of_transformers(
    model_and_params, reference, early_stopping, length_penalty: float, more: dict
) -> None:
    torch, theirs = reference
    model, params = model_and_params
    search = BeamSettings(beams=4, length_penalty=length_penalty, early_stopping=early_stopping, returned=3)
    ours = beam_search(model, params, PROMPTS, max_new_tokens=12, search=search, eos_ids=(3, 4), **more)
    for prompt, beams in zip(PROMPTS, ours, strict=True):
        out = theirs.generate(
            torch.tensor([prompt]),
            max_new_tokens=12,
            num_beams=4,
            num_return_sequences=3,
            do_sample=False,
            eos_token_id=[3, 4],
            pad_token_id=1,
            bos_token_id=None,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            return_dict_in_generate=True,
            output_scores=True,
            **more,
        )
        np.testing.assert_allclose([beam.score for beam in beams], out.sequences_scores.numpy(), atol=1e-4)
        for beam, row in zip(beams, out.sequences.tolist(), strict=True):
            padded = row[len(prompt) :]
            assert padded[: len(beam.tokens)] == beam.tokens
            assert set(padded[len(beam.tokens) :]) <= {1}


@pytest.mark.parity
def test_greedy_equals_that_of_transformers(model_and_params, reference) -> None:
    torch, theirs = reference
    model, params = model_and_params
    for prompt, row in zip(PROMPTS, generate(model, params, PROMPTS, max_new_tokens=20, eos_ids=(3,)), strict=True):
        arguments = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": 3, "pad_token_id": 0}
        assert row == theirs.generate(torch.tensor([prompt]), **arguments)[0, len(prompt) :].tolist()


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


@pytest.mark.parametrize(
    "wrong",
    [
        {"beams": 1},
        {"beams": 4, "returned": 5},
        {"beams": 4, "early_stopping": "always"},
    ],
)
def test_contradictory_searches_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(reversed(wrong)))):
        BeamSettings(**wrong)


def test_bad_continuations_are_refused(model_and_params) -> None:
    model, params = model_and_params
    with pytest.raises(ValueError, match="one continuation"):
        score(model, params, PROMPTS, [[1]])
    with pytest.raises(ValueError, match="continuation 0 needs"):
        score(model, params, [[1]], [[]])
