"""The benchmarks next to transformers at toy size: all sides run, and read or compute the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import train_step
from benchmarks.load_hf import compare, run_jaxllm, run_transformers, write


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parity
def test_both_sides_load_the_same(tmp_path: Path, dtype: str) -> None:
    pytest.importorskip("transformers")
    size = write("toy", dtype, tmp_path)["bytes"]
    ours, theirs = run_jaxllm("toy", dtype, tmp_path), run_transformers("toy", dtype, tmp_path)
    compare(tmp_path)
    assert size > 200_000 and 0 < ours["seconds"] and 0 < theirs["seconds"] <= theirs["seconds_own"]


@pytest.mark.parity
@pytest.mark.parametrize("shape", ["toy", "toy_t5"])
def test_both_sides_train_the_same(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    ours = train_step.run_jaxllm(shape, "float32", 2, tmp_path)
    theirs = train_step.run_torch("torch_eager", shape, "float32", 2, tmp_path)
    monkeypatch.setattr(train_step, "SIDES", ("jaxllm", "torch_eager"))
    assert train_step.compare(tmp_path, {"jaxllm": ours, "torch_eager": theirs}, "float32") < 1e-5
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2) and theirs["loss"] < theirs["first_loss"]
    with pytest.raises(SystemExit, match="the speed of a wrong model"):
        train_step.compare(tmp_path, {"jaxllm": ours, "torch_eager": {"first_loss": 2.0}}, "float32")
