"""Run folders of an earlier commit: today's code resumes, generates from, converts and starts from them as it did.

`make_runs.py` made run_folders/. Tokens are compared where the logits leave no doubt. Converted tensors are copies and
are compared bit by bit; losses and gradient norms within the tolerance of the run's compute dtype.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file

from display.convert import export_run
from jaxllm.config.file import load_config
from jaxllm.generation import generate
from jaxllm.run.load import load_text_model
from jaxllm.run.trainer import pretrain
from tests.conftest import TOLERANCE

FOLDERS = Path(__file__).parent / "run_folders"
RESULTS = json.loads((FOLDERS / "results.json").read_text(encoding="utf-8"))
# A token is certain when its logit leads by this part of the largest logit, 100 times float32's tolerance.
CERTAIN = 100 * TOLERANCE["float32"]


class Golden(NamedTuple):
    """A run folder in the current folder, and what it must give."""

    want: dict[str, Any]
    tolerance: float


@pytest.fixture(params=["llama_float32", "llama_float16", "t5_float32", "t5_float16"])
def golden(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Golden:
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(FOLDERS / f"{request.param}.zip") as archive:
        archive.extractall()
    Path("text.jsonl").write_bytes((FOLDERS / "text.jsonl").read_bytes())
    os.utime("text.jsonl", ns=(RESULTS["modified"], RESULTS["modified"]))
    return Golden(RESULTS[request.param], TOLERANCE[request.param.partition("_")[2]])


def rows(folder: str) -> list[dict[str, Any]]:
    """Rows of metrics, without those of a checkpoint's fingerprint, which came later."""
    found = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if "fingerprint" not in row]


def assert_same_numbers(found: dict[str, Any], want: dict[str, Any], tolerance: float) -> None:
    exact = ("step", "loss_scale", "skipped")
    assert {key: found[key] for key in want if key in exact} == {key: want[key] for key in want if key in exact}
    for key in want.keys() - set(exact):
        assert found[key] == pytest.approx(want[key], rel=tolerance), (key, want["step"])


def test_resumes_with_the_losses_it_had(golden: Golden) -> None:
    summary = pretrain(load_config("run/config.yaml"))
    assert (summary.resumed_from, summary.step) == (RESULTS["stop"], RESULTS["steps"])
    found, before = rows("run"), golden.want["before"]
    assert [{key: row[key] for key in want} for row, want in zip(found, before, strict=False)] == before
    for row, want in zip(found[len(before) :], golden.want["resumed"], strict=True):
        assert_same_numbers(row, want, golden.tolerance)


def test_starts_another_run_at_its_loss(golden: Golden) -> None:
    pretrain(load_config("run/config.yaml", RESULTS["init_from"]), stop_at=1)
    assert_same_numbers(rows("second")[0], golden.want["init_from"], golden.tolerance)


def test_continues_prompts_with_the_same_tokens(golden: Golden) -> None:
    model = load_text_model("run")
    for case in golden.want["generated"]:
        ids = model.encode(case["prompt"])
        assert ids == case["ids"]
        new = len(case["new"])
        found = generate(model.model, model.params, [ids], max_new_tokens=new, eos_ids=(), pad_id=model.pad_id)
        certain = int(np.argmin([*case["margins"], 0] > np.float64(CERTAIN)))
        assert certain > new // 2 and found[0][:certain] == case["new"][:certain]


def test_converts_to_the_same_tensors(golden: Golden) -> None:
    export_run("run", "hf")
    assert json.loads(Path("hf/config.json").read_text()) == golden.want["converted"]["config"]
    tensors = load_file("hf/model.safetensors")
    hashes = {name: [*map(str, x.shape), str(x.dtype), digest(x)] for name, x in tensors.items()}
    assert hashes == golden.want["converted"]["tensors"]


def digest(x: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()[:16]
