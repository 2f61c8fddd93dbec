"""The walk over both models names the first sublayer that differs, and none for equal models."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import jaxllm
from benchmarks import parity
from jaxllm.models import Llama, build
from tests.parity import llama_cases as cases

pytest.importorskip("torch")
pytest.importorskip("transformers")
# torch and transformers warn about themselves.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def walked(llama_directory):
    folder = llama_directory("qwen3")
    return *jaxllm.load_hf(folder), parity._reference(folder, cases.tokens())


def first(model: Llama, params, reference) -> str | None:
    rows = parity.compare(model, params, reference, cases.tokens())
    return next((row.name for row in rows if row.relative > 1e-4), None)


def test_equal_models_agree_at_every_sublayer(llama_directory, capsys) -> None:
    assert parity.main([str(llama_directory("mistral")), "--length", "24"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "no sublayer diverges"
    assert lines[-2].startswith("logits (end to end)") and float(lines[-2].split("KL ")[1]) < 1e-9
    assert len(lines) == 3 + 2 * 12 + 2 + 1


def test_a_wrong_weight_is_named(walked) -> None:
    model, params, reference = walked
    for name in ("k_norm", "up_proj"):
        leaf = "weight" if name == "k_norm" else "kernel"
        broken = params["layers"][name][leaf].at[1].multiply(1.01)
        layers = {**params["layers"], name: {**params["layers"][name], leaf: broken}}
        assert first(model, {**params, "layers": layers}, reference) == f"layer 1 {name}"


def test_a_wrong_setting_is_named_where_it_acts(walked) -> None:
    model, params, reference = walked
    assert first(model, params, reference) is None
    rope = dataclasses.replace(model.config.rope, theta=500.0)
    assert first(build(dataclasses.replace(model.config, rope=rope)), params, reference) == "rope cos"
    window = dataclasses.replace(model.config, sliding_window=9)
    assert first(build(window), params, reference) == "layer 0 attention"


def test_the_script_names_the_first_divergence(llama_directory, monkeypatch, capsys) -> None:
    folder = llama_directory("qwen3")
    reference = parity._reference(folder, cases.tokens())
    broken = {**reference, "layer 1 v_proj": reference["layer 1 v_proj"] * 1.01}
    monkeypatch.setattr(
        parity, "walk", lambda path, tokens: parity.compare(*jaxllm.load_hf(path), broken, cases.tokens())
    )
    assert parity.main([str(folder)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "first divergence: layer 1 v_proj"


@pytest.mark.parametrize("length", ["0", "-1"])
def test_a_length_that_is_none_is_refused(length: str, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        parity.main([str(tmp_path), f"--length={length}"])
    assert f"error: --length must be at least 1, got {length}" in capsys.readouterr().err


def test_other_families_are_refused(tmp_path: Path, t5_directory, capsys) -> None:
    assert parity.main([str(tmp_path)]) == 2
    assert "error: no config.json" in capsys.readouterr().err
    assert parity.main([str(t5_directory("v1_0"))]) == 2
    assert "is a t5; only the Llama family can be compared by sublayers" in capsys.readouterr().err
