"""Whole runs of T5: resume is exact, spans are evaluated, and a run fine-tunes on pairs with the same tokenizer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from display.convert import export_run
from jaxllm.config import RunConfig
from jaxllm.config.file import parse_config
from jaxllm.run.parts import Summary
from jaxllm.run.trainer import pretrain


def config(folder: Path, name: str, data: dict, **training: object) -> RunConfig:
    model = {"family": "t5", "vocab_size": 420, "d_model": 16, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    defaults = {"steps": 4, "batch_size": 4, "save_every": 2, "eval_every": 4, "log_every": 1, "eval_batches": 2}
    shared = {"sample_tokens": 0, "run_dir": str(folder / name)}
    return parse_config(
        {
            "model": {**model, "head_dim": 8, "dropout_rate": 0.1},
            "optimizer": {"name": "adamw_rms", "learning_rate": 3e-2, "weight_decay": 0.0},
            "data": {"validation_fraction": 0.2, "sequence_length": 32, "source": "files", **data},
            "training": {**defaults, **shared, **training},
        }
    )


def final_params(run: RunConfig) -> list[np.ndarray]:
    folder = Path(run.training.run_dir) / "checkpoints" / str(run.training.steps) / "state"
    return jax.tree.leaves(ocp.StandardCheckpointer().restore(folder.absolute())["params"])


def rows(run: RunConfig) -> list[dict[str, float]]:
    lines = (Path(run.training.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5")
    (folder / "corpus").mkdir()
    for i in range(20):
        text = "".join(f"line {j}: the cat {i} sat on mat {j % 7}\n" for j in range(20))
        (folder / "corpus" / f"{i}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[RunConfig, Summary]:
    data = {"path": str(folder / "corpus"), "objective": "span_corruption"}
    run = config(folder, "whole", data, sample_tokens=6, sample_prompt="the <extra_id_0> sat")
    return run, pretrain(run)


def test_resumed_equals_uninterrupted(folder: Path, whole: tuple[RunConfig, Summary]) -> None:
    """With dropout on: its keys, the masks of spans and the order of rows all continue as they were."""
    run, summary = whole
    parts = config(folder, "parts", {"path": str(folder / "corpus"), "objective": "span_corruption"})
    assert pretrain(parts, stop_at=2).step == 2
    resumed = pretrain(parts)
    assert (resumed.resumed_from, resumed.finished) == (2, True)
    for a, b in zip(final_params(run), final_params(parts), strict=True):
        np.testing.assert_array_equal(a, b)
    assert summary.validation == resumed.validation
    assert set(summary.validation) == {"step", "loss", "bits_per_target_byte", "accuracy", "spans_exact"}
    counted = [{k: row[k] for k in ("loss", "grad_norm", "bits_per_target_byte")} for row in rows(run) if "loss" in row]
    again = [{k: row[k] for k in ("loss", "grad_norm", "bits_per_target_byte")} for row in rows(parts) if "loss" in row]
    assert counted == again and len(counted) == 4


def test_the_sample_shows_blanks_and_answers(whole: tuple[RunConfig, Summary]) -> None:
    text = (whole[1].folder / "sample.txt").read_text()
    assert "--- text with blanks\nthe <extra_id_0> sat\n" in text
    assert text.count("--- the model's answer") == 3 and text.count("--- the truth") == 2
    assert text.count("--- filled in") == 3 and "the «" in text


def test_a_blank_that_the_tokenizer_lacks_is_found_at_the_start(folder: Path) -> None:
    data = {"path": str(folder / "corpus"), "objective": "span_corruption"}
    run = config(folder, "blank", data, sample_tokens=6, sample_prompt="the <extra_id_100> sat")
    with pytest.raises(ValueError, match="the prompt has <extra_id_100>, the tokenizer has 100 sentinels"):
        pretrain(run)
    assert not (folder / "blank" / "checkpoints").exists()


@pytest.mark.parametrize("start", ["scratch", "run", "hf"])
def test_fine_tuning_on_pairs(start: str, folder: Path, whole: tuple[RunConfig, Summary]) -> None:
    """With a tiny learning rate, so that a run ends with the parameters that it started from."""
    pairs = folder / f"{start}.jsonl"
    records = [{"inputs": f"cat {i}", "targets": f"mat {i}"} for i in range(60)]
    pairs.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = {"path": str(pairs), "objective": "seq2seq", "text_key": "inputs", "target_key": "targets"}
    data |= {"target_length": 16, "tokenizer": str(whole[1].folder / "tokenizer.json")}
    source = {"scratch": None, "run": whole[1].folder, "hf": folder / "exported"}[start]
    if start == "hf":
        export_run(whole[1].folder, folder / "exported")
    init = {} if source is None else {"init_from": str(source)}
    tuned = config(folder, f"tuned_{start}", data, steps=2, **init)
    tuned = dataclasses.replace(tuned, optimizer=dataclasses.replace(tuned.optimizer, learning_rate=1e-30))
    summary = pretrain(tuned)
    kept = [(Path(run.training.run_dir) / "tokenizer.json").read_text() for run in (whole[0], tuned)]
    assert kept[0] == kept[1]
    assert summary.finished and 0 <= summary.validation["spans_exact"] <= 1
    assert {type(value) for value in summary.validation.values()} <= {int, float}  # not NumPy's, which print their type
    pretrained = zip(final_params(whole[0]), final_params(tuned), strict=True)
    assert all(np.allclose(a, b, atol=1e-7) for a, b in pretrained) == (start != "scratch")
