"""Branches: all of a run's state continues in another folder, to the bit, and the first run is only read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxllm.config import RunConfig
from jaxllm.run.parts import Summary
from jaxllm.run.record import read_metrics
from jaxllm.run.trainer import pretrain
from jaxllm.storage.checkpoint_reading import CheckpointError
from jaxllm.storage.folder import RunFolderError
from tests.conftest import write_corpus
from tests.run.test_pretrain import config, copy_of, final_params

HALF = {"compute": "float16", "loss_scale": "dynamic", "initial_scale": 256.0, "growth_interval": 3}
TIMES = {"tokens_per_second", "tflops", "data_wait"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("branches")
    write_corpus(folder / "corpus")
    return folder


def stable(folder: Path, *, decay: int = 2, data: dict[str, Any] | None = None, **training: Any) -> RunConfig:
    """A run of eight steps, the last two of which decay; its loss scale moves."""
    rule = {"schedule": "wsd", "warmup_steps": 1, "decay_steps": decay}
    cadence = {"save_every": 2, "eval_every": 4, "keep": 9, **training}
    return config(folder, folder.parent / "corpus", optimizer=rule, precision=HALF, data=data or {}, training=cadence)


@pytest.fixture(scope="module")
def parent(shared: Path) -> tuple[RunConfig, Summary]:
    run = stable(shared / "parent")
    return run, pretrain(run)


def rows_after(folder: Path, step: int) -> list[dict[str, Any]]:
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["step"] > step]
    return [{name: row[name] for name in row.keys() - TIMES} for row in rows]


def contents(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def assert_same_end(run: RunConfig, other: RunConfig, *, after: int) -> None:
    for a, b in zip(final_params(run), final_params(other), strict=True):
        np.testing.assert_array_equal(a, b)
    folders = Path(run.training.run_dir), Path(other.training.run_dir)
    rows, others = (rows_after(folder, after) for folder in folders)
    assert rows == others and any("fingerprint" in row for row in rows) and any("loss" in row for row in rows)


def test_a_branch_equals_the_continuation_of_its_parent(shared: Path, parent: tuple[RunConfig, Summary]) -> None:
    """Also when it stops and resumes, and the folder of its parent is gone."""
    before = contents(shared / "parent")
    run = stable(shared / "same", branch_from=f"{shared / 'parent'}@4")
    first = pretrain(run, stop_at=5)
    assert (first.step, first.resumed_from, first.metrics[0]["step"]) == (5, 4, 4)
    assert contents(shared / "parent") == before
    hidden = (shared / "parent").rename(shared / "hidden")
    try:
        assert pretrain(run).resumed_from == 5
    finally:
        hidden.rename(shared / "parent")
    assert_same_end(run, parent[0], after=5)
    assert (shared / "same" / "tokenizer.json").read_bytes() == (shared / "parent" / "tokenizer.json").read_bytes()


def test_a_branch_without_a_step_to_do_is_a_run_too(shared: Path, parent: tuple[RunConfig, Summary]) -> None:
    run = stable(shared / "ended", branch_from=str(shared / "parent"))
    assert pretrain(run).finished and pretrain(run).finished
    for a, b in zip(final_params(run), final_params(parent[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(RunFolderError, match="keeps no checkpoint of step 0; it keeps 2, 4, 6, 8"):
        pretrain(stable(shared / "zero", branch_from=f"{shared / 'parent'}@0"))


def test_decays_grow_from_one_stable_run_as_if_each_had_been_made_alone(shared: Path) -> None:
    pretrain(stable(shared / "trunk"), stop_at=4)
    for steps, decay in ((6, 2), (7, 3)):
        alone = stable(shared / f"alone{steps}", steps=steps, decay=decay)
        pretrain(alone)
        branch = stable(shared / f"branch{steps}", steps=steps, decay=decay, branch_from=str(shared / "trunk"))
        assert pretrain(branch).resumed_from == 4  # the newest
        assert_same_end(branch, alone, after=4)


def test_a_branch_that_ends_before_its_first_save_begins_again(
    shared: Path, parent: tuple[RunConfig, Summary], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stable(shared / "again", branch_from=f"{shared / 'parent'}@4")
    with monkeypatch.context() as patch:
        patch.setattr("jaxllm.storage.checkpoint.ocp.CheckpointManager.save", lambda *_, **__: 1 / 0)
        with pytest.raises(CheckpointError):
            pretrain(run)
    assert pretrain(run).resumed_from == 4
    assert_same_end(run, parent[0], after=4)
    assert [row["step"] for row in read_metrics(shared / "again" / "metrics.jsonl")].count(4) == 2  # saved, evaluated


def test_what_a_resume_would_refuse_is_refused_by_name(shared: Path, parent: tuple[RunConfig, Summary]) -> None:
    source = shared / "parent"

    def branch(at: str, **changes: Any) -> RunConfig:
        return stable(shared / "refused", branch_from=f"{source}{at}", **changes)

    with pytest.raises(RunFolderError, match=r"(?s)training.seed: 0 -> 1.*as they are there"):
        pretrain(branch("@4", seed=1))
    with pytest.raises(RunFolderError, match="rates of the 6 steps that are done would differ"):
        pretrain(branch("@6", decay=4))
    with pytest.raises(RunFolderError, match="keeps no checkpoint of step 5; it keeps 2, 4, 6, 8"):
        pretrain(branch("@5"))
    with pytest.raises(RunFolderError, match="is not a run folder with checkpoints"):
        pretrain(branch("/nowhere@4"))
    assert {path.name for path in (shared / "refused").iterdir()} == {".lock"}
    with pytest.raises(RunFolderError, match=r"training.branch_from: None -> "):
        pretrain(stable(source, branch_from=f"{source}@4"))


def test_a_damaged_checkpoint_of_the_parent_is_passed_over_and_left(
    shared: Path, parent: tuple[RunConfig, Summary], caplog: pytest.LogCaptureFixture
) -> None:
    run = copy_of(parent[0], shared / "damaged")
    for path in (shared / "damaged" / "checkpoints" / "8" / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 200:
            path.write_bytes(bytes(path.stat().st_size))
    before = contents(Path(run.training.run_dir))
    with pytest.raises(CheckpointError, match=r"can be read \(tried steps \[8\]\)"):
        pretrain(stable(shared / "exact", branch_from=f"{shared / 'damaged'}@8"))
    branch = stable(shared / "fallen", branch_from=str(shared / "damaged"))
    with caplog.at_level("INFO", logger="jaxllm"):
        assert pretrain(branch).resumed_from == 6 and contents(shared / "damaged") == before
    assert "from step 6; 1 newer ones are damaged" in caplog.text
    assert_same_end(branch, parent[0], after=6)
    assert json.loads((shared / "fallen" / "metrics.jsonl").read_text().splitlines()[0])["step"] == 6
