"""Verifying a run: verdicts agree with what a resume does, a resume is proved exact, and no folder is changed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

import verify_run
from display.verify import compare_runs, verify_checkpoints, verify_resume
from jaxllm.run.trainer import pretrain
from jaxllm.storage.checkpoint import CheckpointError, save_params
from tests.conftest import write_corpus
from tests.run.test_pretrain import config

GOLDEN = Path(__file__).parent.parent / "golden" / "run_folders"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 8 steps with checkpoints of steps 4, 6 and 8, whose data.path is relative."""
    folder = tmp_path_factory.mktemp("trained")
    write_corpus(folder / "corpus")
    settings = {"save_every": 2, "keep": 3, "sample_tokens": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pretrain(config(Path("run"), Path("corpus"), training=settings, model={"d_model": 8, "num_layers": 1}))
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def contents(folder: Path) -> dict[Path, Any]:
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}


def change_row(folder: Path, step: int, name: str, value: Any) -> None:
    file = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    changed = [{**row, name: value} if row["step"] == step and name in row else row for row in rows]
    assert changed != rows
    file.write_text("".join(json.dumps(row) + "\n" for row in changed))


def change_leaf(folder: Path, step: int, leaf: str) -> None:
    """Another fingerprint of a leaf, as if other bits had been saved."""
    file = folder / "checkpoints" / str(step) / "data" / "metadata"
    record = json.loads(file.read_text())
    record["fingerprints"][leaf] = "0" * 16
    file.write_text(json.dumps(record))


def test_whole_checkpoints_are_listed_and_nothing_is_changed(run: Path) -> None:
    before = contents(run)
    report = verify_checkpoints(run)
    assert report.good and contents(run) == before
    head, *lines = report.text.splitlines()
    assert head == f"{run}: 3 checkpoints"
    assert [line.split()[0] for line in lines] == ["4", "6", "8"] and all("MB  whole" in line for line in lines)
    assert [line.endswith("whole, best") for line in lines].count(True) == 1  # evaluated at steps 4 and 8


def test_damage_is_named(run: Path) -> None:
    change_leaf(run, 6, "params/embed")
    (run / "checkpoints" / "8" / "state" / "manifest.ocdbt").write_bytes(b"")
    change_row(run, 4, "fingerprint", "0" * 16)
    report = verify_checkpoints(run)
    _, fourth, sixth, eighth = report.text.splitlines()
    assert not report.good
    assert "differs: its fingerprint is" in fourth and f"metrics.jsonl has {'0' * 16} of its step" in fourth
    assert "damaged: params/embed has fingerprint" in sixth and "damaged: " in eighth
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"4", "6", "8"}


def test_a_record_of_metrics_is_not_needed(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    report = verify_checkpoints(run)
    assert report.good and report.text.count("whole, metrics.jsonl has no fingerprint of its step") == 3
    with pytest.raises(ValueError, match=r"metrics.jsonl has no fingerprint of steps 5 to 8; there is none of a later"):
        verify_resume(run, 4, 4)


def test_a_run_of_an_earlier_version_cannot_be_verified(run: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(GOLDEN / "llama_float32.zip") as archive:
        archive.extractall(tmp_path)
    report = verify_checkpoints(tmp_path / "run")
    assert report.good and "no fingerprint, cannot be verified" in report.text
    step = int(report.text.splitlines()[1].split()[0])
    with pytest.raises(
        ValueError, match=f"metrics.jsonl has no fingerprint of steps {step + 1} to {step + 2}; there is"
    ):
        verify_resume(tmp_path / "run", step, 2)
    with pytest.raises(ValueError, match="have no step of which both recorded a fingerprint"):
        compare_runs(run, tmp_path / "run")


def test_converted_parameters_are_verified(tmp_path: Path) -> None:
    save_params(tmp_path / "checkpoints", {"embed": jnp.ones((4, 2)), "head": {"kernel": jnp.ones((2, 4))}})
    assert verify_checkpoints(tmp_path).good
    change_leaf(tmp_path, 0, "params/head/kernel")
    assert "damaged: params/head/kernel has fingerprint" in verify_checkpoints(tmp_path).text


def test_checkpoints_are_verified_on_several_devices(tmp_path: Path) -> None:
    """Leaves are split over them, as a state that one device has no room for must be."""
    save_params(tmp_path / "checkpoints", {"embed": jnp.ones((4, 2)), "head": {"kernel": jnp.ones((2, 4))}})
    code = (
        "import sys, jax; from display.verify import verify_checkpoints; "
        "report = verify_checkpoints(sys.argv[1]); assert jax.device_count() == 2 and report.good, report"
    )
    scripts = str(Path(verify_run.__file__).parent)
    flags = "--xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join([scripts, *sys.path])}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_leaf_that_is_gone_is_damage(tmp_path: Path) -> None:
    save_params(tmp_path / "checkpoints", {"embed": jnp.ones((4, 2))})
    change_leaf(tmp_path, 0, "params/other")
    assert "damaged: leaves are missing" in verify_checkpoints(tmp_path).text


def test_a_resume_is_proved_exact_in_a_copy(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained.parent)  # where the run was started: its data.path is relative
    before = contents(trained)
    report = verify_resume("run", 4, 4)
    assert report.good and contents(trained) == before
    assert "steps 5 to 8 are exactly those of run" in report.text
    assert "2 of fingerprint, 4 of loss, 1 of validation/loss" in report.text


def test_a_proof_opens_no_tracker_of_the_run(run: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B would log the copy into the run of the original."""
    monkeypatch.chdir(trained.parent)
    text = (run / "config.yaml").read_text()
    changed = re.sub(r"trackers: \[\]", "trackers: [wandb]", text).replace("norms_every: 0", "norms_every: 1")
    assert changed.count("wandb") == changed.count("norms_every: 1") == 1
    (run / "config.yaml").write_text(changed)
    opened: list[str] = []
    monkeypatch.setattr("jaxllm.run.trackers._wandb", lambda *_: opened.append("wandb"))
    assert verify_resume(run, 6, 2).good and not opened


def test_a_resume_that_is_not_exact_is_noticed(run: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained.parent)
    change_row(run, 8, "fingerprint", "0" * 16)
    report = verify_resume(run, 6, 2)
    assert not report.good
    assert (
        f"fingerprint of step 8 was {'0' * 16} and is" in report.text and "before it: 0 of fingerprint" in report.text
    )
    change_row(run, 7, "loss", 0.5)
    assert "loss of step 7 was 0.5 and is" in verify_resume(run, 6, 9).text


def test_a_resume_needs_a_checkpoint_and_a_recorded_fingerprint(
    run: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained.parent)
    with pytest.raises(CheckpointError, match=r"keeps no checkpoint of step 2; it keeps 4, 6, 8$"):
        verify_resume(run, 2, 4)
    with pytest.raises(ValueError, match="no fingerprint of steps 5 to 5; the next is 2 steps on"):
        verify_resume(run, 4, 1)
    change_leaf(run, 4, "params/embed")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read"):
        verify_resume(run, 4, 4)
    with pytest.raises(CheckpointError, match=r"there is no checkpoint in .*; name the training.run_dir of a run"):
        verify_checkpoints(run / "corpus")


def test_where_two_runs_part_is_named(run: Path, trained: Path) -> None:
    report = compare_runs(run, trained)
    assert report.good and report.text == "the fingerprints of all 4 common steps are equal, up to step 8"
    for step in (6, 8):
        change_row(run, step, "fingerprint", "0" * 16)
        for leaf in ("params/layers/mlp/up_proj/kernel", "params/final_norm/weight", "opt_state/1/mu/embed"):
            change_leaf(run, step, leaf)
    change_row(run, 5, "loss", 0.5)
    report = compare_runs(run, trained)
    first, losses, leaf = report.text.splitlines()
    assert not report.good and first.startswith("fingerprints differ first at step 6; those of 2 common")
    assert losses.startswith("losses differ first at step 5: 0.5 and")
    assert leaf.startswith("checkpoint 6: 3 of ") and leaf.endswith("first params/layers/mlp/up_proj/kernel")
    for step in (6, 8):
        shutil.rmtree(run / "checkpoints" / str(step))
    change_row(run, 6, "fingerprint", "1" * 16)
    assert compare_runs(run, trained).text.endswith("none of a step that differs is kept by both")


def test_the_command_exits_by_what_it_finds(
    run: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["verify_run.py", str(run), *arguments])
        return verify_run.main()

    assert command() == command("--against", str(trained)) == 0
    assert command("--resume", "5", "2") == 2
    assert "error: " in capsys.readouterr().err
    change_leaf(run, 8, "step")
    assert command() == command("--against", str(trained)) == 1
    assert "first step" in capsys.readouterr().out
