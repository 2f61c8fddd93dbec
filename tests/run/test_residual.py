"""The dtype of a float16 T5's residual stream: decided when a run starts, written to its config, and kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from jaxllm.config import RunConfig
from jaxllm.config.file import load_config
from jaxllm.run.trainer import pretrain
from jaxllm.storage import folder as run_folder
from jaxllm.storage.folder import RunFolderError, settle_residual
from tests.run.test_pretrain import config

FLOAT16 = {"compute": "float16", "loss_scale": "dynamic"}


def run_of(tmp_path: Path, corpus: Path, **precision: object) -> RunConfig:
    return config(
        tmp_path / "run",
        corpus,
        model={"family": "t5", "head_dim": 8, "num_layers": 1},
        data={"objective": "span_corruption", "sequence_length": 32},
        precision={**FLOAT16, **precision},
        training={"steps": 2, "save_every": 1, "eval_every": 2, "sample_tokens": 0},
    )


def written(run: RunConfig) -> dict[str, str]:
    return load_config(Path(run.training.run_dir) / "config.yaml").precision.islands


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "has_bfloat16", lambda: True)


def test_a_new_run_writes_bfloat16_and_a_resumed_one_keeps_it(
    ampere: None, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path, corpus)
    pretrain(run, stop_at=1)
    assert written(run) == {"residual": "bfloat16"}
    monkeypatch.setattr(run_folder, "has_bfloat16", lambda: False)  # resumed elsewhere, by the same config
    assert pretrain(run).resumed_from == 1
    assert written(run) == {"residual": "bfloat16"}
    with pytest.raises(RunFolderError, match=r"precision\.islands"):
        pretrain(run_of(tmp_path, corpus, islands={"residual": "float32"}))


def test_a_run_from_before_stays_in_float32(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path, corpus)
    pretrain(run, stop_at=1)
    assert written(run) == {}
    monkeypatch.setattr(run_folder, "has_bfloat16", lambda: True)
    assert pretrain(run).resumed_from == 1
    assert written(run) == {}


@pytest.mark.usefixtures("ampere")
def test_it_is_for_a_float16_t5_whose_config_leaves_it_open(tmp_path: Path, corpus: Path) -> None:
    run = run_of(tmp_path, corpus, islands={"softmax": "float32"})
    assert settle_residual(run).precision.islands == {"softmax": "float32", "residual": "bfloat16"}
    assert settle_residual(run).precision.loss_scale == "dynamic"
    chosen = run_of(tmp_path, corpus, islands={"residual": "float32"})
    bfloat16 = dataclasses.replace(run, precision=dataclasses.replace(run.precision, compute="bfloat16"))
    llama = config(tmp_path / "other", corpus, precision=FLOAT16)
    for other in (chosen, bfloat16, llama):
        assert settle_residual(other) == other


def test_a_cpu_keeps_float32(tmp_path: Path, corpus: Path) -> None:
    run = run_of(tmp_path, corpus)
    assert settle_residual(run) == run
