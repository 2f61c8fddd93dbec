"""A family is a config class and a row: an unknown one passes through the whole library."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

import jaxllm
from display.convert import export_run
from jaxllm.config import RunConfig
from jaxllm.config.file import load_config
from jaxllm.config.model import MODEL_CONFIGS
from jaxllm.generation import BeamSettings, beam_search, generate, score
from jaxllm.interop.safetensors_dir import InteropError
from jaxllm.models import FAMILIES, build, init_params
from jaxllm.run.load import load_text_model
from jaxllm.run.start import read_run
from jaxllm.run.trainer import pretrain
from jaxllm.study.ledger import train_step_ledger, violations
from jaxllm.training.attribution import gradient_groups
from jaxllm.training.fit import estimate_fit
from jaxllm.training.program import program_of
from tests.run.test_pretrain import final_params, losses, write_corpus
from tests.toy_family import TOY, Toy, ToyConfig

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5]]


@pytest.fixture(autouse=True)
def toy_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two rows that make it known."""
    monkeypatch.setitem(MODEL_CONFIGS, "toy", ToyConfig)
    monkeypatch.setitem(FAMILIES, "toy", TOY)


def run_in(folder: Path) -> RunConfig:
    write_corpus(folder / "corpus")
    file = folder / "toy.yaml"
    text = """
model: {family: toy, vocab_size: 400, d_model: 16}
data: {source: files, path: FOLDER/corpus, sequence_length: 32, document_mask: false, validation_fraction: 0.2}
training: {run_dir: FOLDER/run, steps: 8, batch_size: 4, save_every: 4, eval_every: 4, log_every: 1, eval_batches: 2,
  sample_tokens: 4}
"""
    file.write_text(text.replace("FOLDER", str(folder)), encoding="utf-8")
    return load_config(file)


def test_it_trains_resumes_and_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = run_in(tmp_path / "whole")
    assert isinstance(whole.model, ToyConfig)
    summary = pretrain(whole)
    assert summary.finished and summary.validation["bits_per_byte"] > 0 and losses(whole)[8] < losses(whole)[1]
    parts = run_in(tmp_path / "parts")
    pretrain(parts, stop_at=4)
    assert pretrain(parts).resumed_from == 4
    for a, b in zip(final_params(whole), final_params(parts), strict=True):
        np.testing.assert_array_equal(a, b)
    again, params = read_run(tmp_path / "whole" / "run")
    assert again.model == whole.model and {"embed", "mixer", "half_life"} == set(params)
    text_model = load_text_model(tmp_path / "whole" / "run")
    assert isinstance(text_model.model, Toy) and text_model.encode("x")[0] == text_model.begin[0]
    with pytest.raises(InteropError, match="family 'toy' has no Hugging Face form; llama, t5 have one"):
        export_run(tmp_path / "whole" / "run", tmp_path / "hf")
    assert not (tmp_path / "hf" / "config.json").exists()


def test_it_decodes_as_it_predicts() -> None:
    """Cached equals uncached: greedy tokens, scores and beams are those of the whole forward pass."""
    model = build(ToyConfig(vocab_size=31, d_model=8))
    params = init_params(model, jax.random.key(3))
    written = generate(model, params, PROMPTS, max_new_tokens=6)
    for prompt, new in zip(PROMPTS, written, strict=True):
        row = list(prompt)
        for token in new:
            logits = model.apply({"params": params}, np.array([row]))[0, -1]
            assert token == int(logits.argmax())
            row.append(token)
    beams = beam_search(model, params, PROMPTS, max_new_tokens=4, search=BeamSettings(beams=3, returned=3))
    best, *others = beams[0]
    total = sum(score(model, params, [PROMPTS[0]], [best.tokens])[0])
    assert all(total >= sum(score(model, params, [PROMPTS[0]], [each.tokens])[0]) for each in others)
    found = score(model, params, PROMPTS, [new[:3] for new in written])
    logits = model.apply({"params": params}, np.array([[*PROMPTS[0], *written[0][:2]]]))[0, 2:]
    want = jax.nn.log_softmax(logits)[np.arange(3), np.array(written[0][:3])]
    np.testing.assert_allclose(found[0], want, rtol=1e-5)


def test_it_is_counted_attributed_and_inspected(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    program = program_of(run)
    assert estimate_fit(program).activations > 0 and jaxllm.count_params(program.model) == 400 * 16 + 16 * 16 + 1
    assert set(gradient_groups(init_params(program.model, jax.random.key(0)))) == {"embed", "mixer", "half_life"}
    entries = train_step_ledger(run)
    assert any(entry.kind == "matmul" for entry in entries) and not violations(entries)
