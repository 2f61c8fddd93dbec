"""Whole runs: resume is exact, stops are clean, damage is survived, and bad input is named before training."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from display.in_place import check_in_place
from jaxllm.config import RunConfig
from jaxllm.config.file import ConfigError, dump_config, load_config, parse_config
from jaxllm.data import BatchError
from jaxllm.data.pipeline import Pipeline
from jaxllm.host.device import Device
from jaxllm.models import build, init_params
from jaxllm.run import trainer
from jaxllm.run.parts import StepReport, Summary
from jaxllm.run.record import read_metrics
from jaxllm.run.start import TrainingStopped
from jaxllm.run.steps import Steps
from jaxllm.run.trainer import pretrain
from jaxllm.storage.checkpoint import CheckpointError, Checkpoints
from jaxllm.storage.folder import RunFolderError, open_run_folder
from jaxllm.training.fit import Fit, FitError, check_fit
from tests.conftest import write_corpus

ROOT = Path(__file__).parent.parent.parent


def config(run_dir: Path, corpus: Path, **changes: dict) -> RunConfig:
    sections = {
        "model": {
            "family": "llama",
            "vocab_size": 400,
            "d_model": 32,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
        },
        "data": {"source": "files", "path": str(corpus), "sequence_length": 32, "validation_fraction": 0.2},
        "training": {
            "run_dir": str(run_dir),
            "steps": 8,
            "batch_size": 4,
            "save_every": 4,
            "eval_every": 4,
            "log_every": 1,
            "eval_batches": 2,
            "sample_tokens": 4,
        },
    }
    for name, values in changes.items():
        sections[name] = {**sections.get(name, {}), **values}
    return parse_config(sections)


def final_params(run: RunConfig) -> list[np.ndarray]:
    """Parameters of the newest checkpoint, read by orbax alone."""
    import orbax.checkpoint as ocp

    folder = Path(run.training.run_dir) / "checkpoints"
    step = max(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    state = ocp.StandardCheckpointer().restore((folder / str(step) / "state").absolute())
    return [step, *jax.tree.leaves(state["params"])]


def losses(run: RunConfig) -> dict[int, float]:
    rows = (Path(run.training.run_dir) / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, rows) if "loss" in row}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus for runs that several tests look at."""
    folder = tmp_path_factory.mktemp("shared")
    write_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def whole(shared: Path) -> tuple[RunConfig, Summary]:
    """An uninterrupted run."""
    run = config(shared / "whole", shared / "corpus")
    return run, pretrain(run)


def copy_of(run: RunConfig, folder: Path) -> RunConfig:
    """A copy of the run as it is now, in another folder."""
    shutil.copytree(run.training.run_dir, folder)
    return dataclasses.replace(run, training=dataclasses.replace(run.training, run_dir=str(folder)))


def test_resumed_equals_uninterrupted_bit_for_bit(whole: tuple[RunConfig, Summary], shared: Path) -> None:
    run, summary = whole
    parts = config(shared / "parts", shared / "corpus")
    assert (summary.step, summary.finished, summary.resumed_from) == (8, True, 0)
    shown: list[StepReport] = []
    first = pretrain(parts, stop_at=4, on_step=shown.append)
    assert (first.step, first.finished) == (4, False)
    second = pretrain(parts, on_step=shown.append)
    assert [report.step for report in shown] == list(range(1, 9))
    assert (second.step, second.finished, second.resumed_from) == (8, True, 4)
    for a, b in zip(final_params(run), final_params(parts), strict=True):
        np.testing.assert_array_equal(a, b)
    assert losses(run) == losses(parts)
    assert summary.validation == second.validation
    written = {path.name for path in summary.folder.iterdir()}
    assert {"config.yaml", "tokenizer.json", "metrics.jsonl", "loss.png", "sample.txt"} <= written
    assert load_config(summary.folder / "config.yaml") == run


def test_ctrl_c_once_a_save_has_begun_costs_no_row(
    whole: tuple[RunConfig, Summary], shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import orbax.checkpoint as ocp

    run = config(shared / "interrupted", shared / "corpus")
    save = ocp.CheckpointManager.save

    def interrupted(*args: Any, **options: Any) -> None:
        save(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ocp.CheckpointManager, "save", interrupted)
        pretrain(run)
    assert pretrain(run).resumed_from == 4
    timings = ("tokens_per_second", "tflops", "data_wait")
    rows = [
        [{name: value for name, value in row.items() if name not in timings} for row in summary.metrics]
        for summary in (whole[1], pretrain(run))
    ]
    assert rows[0] == rows[1]


LONG = {"steps": 200, "save_every": 20, "eval_every": 200, "log_every": 5}


@pytest.fixture(scope="module")
def long(shared: Path) -> list[np.ndarray]:
    """Step and final parameters of a run that is long enough to be killed."""
    run = config(shared / "long", shared / "corpus", training={**LONG, "run_dir": str(shared / "long")})
    pretrain(run)
    return final_params(run)


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGKILL])
def test_a_killed_process_goes_on_where_it_was(
    tmp_path: Path, shared: Path, long: list[np.ndarray], kill: signal.Signals
) -> None:
    parts = config(tmp_path / "parts", shared / "corpus", training={**LONG, "run_dir": str(tmp_path / "parts")})
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(parts))
    command = [sys.executable, str(ROOT / "scripts" / "pretrain.py"), str(file)]
    log = tmp_path / "stderr.txt"
    with log.open("w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
    folder = Path(parts.training.run_dir) / "checkpoints"
    deadline = time.time() + 120
    while not (folder.exists() and any(p.name.isdigit() for p in folder.iterdir())):
        assert process.poll() is None and time.time() < deadline, log.read_text()
        time.sleep(0.02)
    process.send_signal(kill)
    code = process.wait(timeout=60)
    assert code == (-signal.SIGKILL if kill == signal.SIGKILL else 75)
    summary = pretrain(parts)
    assert summary.finished and 0 < summary.resumed_from < 200
    for a, b in zip(long, final_params(parts), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_stop_while_compiling_keeps_the_beginning(
    tmp_path: Path, whole: tuple[RunConfig, Summary], shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(tmp_path / "run", shared / "corpus")
    compile_steps = trainer.compile_steps

    def stopped(*arguments: object) -> Steps:
        os.kill(os.getpid(), signal.SIGTERM)
        return compile_steps(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "compile_steps", stopped)
        for _ in range(2):  # the second finds the checkpoint of step 0
            summary = pretrain(run)
            assert (summary.step, summary.finished) == (0, False)
    assert pretrain(run).finished and losses(run) == losses(whole[0])


def test_wall_time_stops_a_run_after_a_step(
    tmp_path: Path, whole: tuple[RunConfig, Summary], shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each start makes a step, also one that takes longer than that to begin."""
    run = config(tmp_path / "run", shared / "corpus", training={"stop_after": "9h59m60s"})
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, run_dir=str(tmp_path / "run")))
    later = [0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + later[0])

    def on_step(report: StepReport) -> None:
        later[0] = 36_000 if report.step >= 3 else 0

    with monkeypatch.context() as patch:
        patch.setattr("jaxllm.host.signals.time", clock)
        assert pretrain(run, on_step=on_step)[:3] == (4, 0, False)
        assert pretrain(run)[:3] == (5, 4, False)
    assert pretrain(run)[:3] == (8, 5, True)
    for a, b in zip(final_params(run), final_params(whole[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert losses(run) == losses(whole[0])


@pytest.mark.parametrize("wrong", ["soon", "", "0s", "1.5h", "30m1h"])
def test_a_wall_time_is_a_duration(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(ConfigError, match=rf"stop_after must be a duration such as 11h30m, 45m or 90s, got '{wrong}'"):
        config(tmp_path / "run", tmp_path, training={"stop_after": wrong})


@pytest.mark.parametrize("broken", [3, 4, 8])
def test_a_batch_that_cannot_be_made_leaves_a_checkpoint_of_the_step_before_it(
    tmp_path: Path, whole: tuple[RunConfig, Summary], shared: Path, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    """The last step is read ahead of an evaluation and a regular checkpoint where the fourth or eighth batch fails."""
    run = config(tmp_path / "run", shared / "corpus")
    read, made = Pipeline.__next__, []

    def fails(pipeline: Pipeline) -> dict[str, np.ndarray]:
        made.append(len(made) + 1)
        if len(made) >= broken:
            raise BatchError(f"no batch {broken}")
        return read(pipeline)

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "__next__", fails)
        with pytest.raises(BatchError, match=rf"^no batch {broken}; the run is saved at step {broken - 1}$"):
            pretrain(run)
    assert final_params(run)[0] == broken - 1 and list(losses(run)) == list(range(1, broken)) and len(made) == broken
    assert pretrain(run)[:3] == (8, broken - 1, True)
    for a, b in zip(final_params(run), final_params(whole[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert losses(run) == losses(whole[0])


def test_an_evaluation_that_cannot_be_made_leaves_a_checkpoint_of_its_step(
    tmp_path: Path, whole: tuple[RunConfig, Summary], shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(tmp_path / "run", shared / "corpus", training={"run_dir": str(tmp_path / "run"), "save_every": 100})

    def fails(*_: object) -> None:
        raise BatchError("no validation")

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "validation", fails)
        with pytest.raises(BatchError, match="no validation; the run is saved at step 4"):
            pretrain(run)
    assert pretrain(run).resumed_from == 4 and losses(run) == losses(whole[0])


def test_a_spoiled_step_is_not_saved_when_a_batch_cannot_be_made(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"training": {"save_every": 100}, "optimizer": {"learning_rate": 1e30, "clip_norm": None}}
    run = config(tmp_path / "run", corpus, **changes)
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, run_dir=str(tmp_path / "run")))
    read, made = Pipeline.__next__, []

    def fails(pipeline: Pipeline) -> dict[str, np.ndarray]:
        made.append(0)
        if len(made) == 4:
            raise BatchError("no batch")
        return read(pipeline)

    monkeypatch.setattr(Pipeline, "__next__", fails)
    with pytest.raises(TrainingStopped, match="the last good checkpoint is none yet"):
        pretrain(run)
    assert not any((tmp_path / "run" / "checkpoints").iterdir())


EVALUATION = ["step", "validation/loss", "validation/bits_per_byte", "validation/accuracy"]


def test_a_finished_run_needs_no_record_of_its_metrics(
    tmp_path: Path, whole: tuple[RunConfig, Summary], caplog: pytest.LogCaptureFixture
) -> None:
    """It evaluates its last step again, of which no evaluation is recorded, and says that all steps are done."""
    caplog.set_level("INFO", logger="jaxllm")
    run = copy_of(whole[0], tmp_path / "run")
    record = tmp_path / "run" / "metrics.jsonl"
    for damage in (record.unlink, lambda: record.write_bytes(b"\xff\x00\n[]\n"), lambda: record.write_bytes(b"")):
        (tmp_path / "run" / "loss.png").unlink(missing_ok=True)
        damage()
        assert pretrain(run).finished
        assert [list(row) for row in read_metrics(record)] == [EVALUATION] and (tmp_path / "run" / "loss.png").exists()
    assert caplog.text.count("all 8 steps are done; raise training.steps, or start a new run") == 3


def test_damaged_checkpoint_falls_back_to_the_newest_whole_one(
    tmp_path: Path, whole: tuple[RunConfig, Summary], caplog: pytest.LogCaptureFixture
) -> None:
    run = copy_of(whole[0], tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints" / "8").rglob("*"):
        if path.is_file() and path.stat().st_size > 200:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with caplog.at_level("INFO", logger="jaxllm"):
        summary = pretrain(run)
    assert summary.resumed_from == 4
    assert "checkpoint 8" in caplog.text and "damaged" in caplog.text
    for a, b in zip(final_params(run), final_params(whole[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    # What could not be read is kept: the disk may have failed for a moment only. A second one does not replace it.
    aside = tmp_path / "run" / "checkpoints.damaged"
    assert [path.name for path in aside.iterdir()] == ["8"]
    for path in (tmp_path / "run" / "checkpoints" / "8").rglob("*"):
        path.write_bytes(b"") if path.is_file() else None
    assert pretrain(run).resumed_from == 4
    assert sorted(path.name for path in aside.iterdir()) == ["8", "8-1"]


def test_all_checkpoints_damaged_is_an_error_that_deletes_nothing(
    tmp_path: Path, whole: tuple[RunConfig, Summary]
) -> None:
    run = copy_of(whole[0], tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read"):
        pretrain(run)
    assert (tmp_path / "run" / "checkpoints" / "4").is_dir()
    command = [sys.executable, str(ROOT / "scripts" / "pretrain.py"), str(tmp_path / "run" / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr


def test_another_config_is_refused_with_the_differing_keys(tmp_path: Path, whole: tuple[RunConfig, Summary]) -> None:
    run = copy_of(whole[0], tmp_path / "run")
    other = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, learning_rate=1e-3))
    with pytest.raises(RunFolderError, match=r"optimizer.learning_rate: 0.0003 -> 0.001"):
        pretrain(other)
    with open_run_folder(dataclasses.replace(run, training=dataclasses.replace(run.training, log_every=7, keep=5))):
        pass
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # what it has logged is of a run, too
    with pytest.raises(RunFolderError, match=r"optimizer.learning_rate: 0.0003 -> 0.001"):
        pretrain(other)


def test_a_run_that_is_too_large_stops_before_it_runs_and_leaves_its_folder(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    needed: list[int] = []

    def check(fit: Fit, size: int, *, limit: int | float) -> None:
        needed.append(size)
        check_fit(fit, size, limit=limit)

    def start(memory: float, *, rows: int, folder: str = "run", stop_at: int = 1, **changes: int) -> Summary:
        device = Device("a GPU", 1, int(memory), None, None)
        monkeypatch.setattr("jaxllm.run.trainer.detect_device", lambda: device)
        run = config(tmp_path / folder, corpus, training={"batch_size": rows, "steps": 2, **changes})
        return pretrain(run, stop_at=stop_at)

    monkeypatch.setattr("jaxllm.run.steps.check_fit", check)
    monkeypatch.setattr("jaxllm.run.trainer.check_fit", check)
    with pytest.raises(FitError, match=r"activations 0\.0, .*moments: set optimizer.moment_dtype=bfloat16"):
        start(1e5, rows=64)
    assert len(needed) == 1 and not (tmp_path / "run" / "checkpoints").exists()  # not even the state has room
    with caplog.at_level("WARNING", logger="jaxllm"), pytest.raises(FitError, match=r"activations: raise training\."):
        start(3e6, rows=64)
    assert caplog.text.count("so the compiler's own figure will decide") == 1
    largest = needed[-1]
    assert start(3e6, rows=2).step == 1  # fewer rows at once, in the same folder
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(FitError):
        start(6e5, rows=2, keep=7, stop_at=2)
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    with caplog.at_level("WARNING", logger="jaxllm"):
        assert start(largest, rows=64, folder="estimated higher").step == 1
    assert needed[-1] == largest and caplog.text.count("so the compiler's own figure will decide") == 3


def test_stopping_before_the_first_step_is_refused(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(ValueError, match="stop_at must be at least 1, got 0"):
        pretrain(config(tmp_path / "run", corpus), stop_at=0)


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with caplog.at_level("WARNING", logger="jaxllm"), open_run_folder(config(tmp_path / "run", corpus)) as folder:
        assert folder == tmp_path / "run" and "cannot be locked (No locks available)" in caplog.text


def test_a_run_folder_is_for_one_process(tmp_path: Path, whole: tuple[RunConfig, Summary]) -> None:
    run = copy_of(whole[0], tmp_path / "run")
    with open_run_folder(run), pytest.raises(RunFolderError, match="another process is training the run in"):
        pretrain(run)
    assert pretrain(run).resumed_from == 8


def test_a_refused_start_changes_nothing(tmp_path: Path, whole: tuple[RunConfig, Summary]) -> None:
    run = copy_of(whole[0], tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="attention: cudnn cannot run this"):
        pretrain(dataclasses.replace(run, model=dataclasses.replace(run.model, attention="cudnn")))
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {path.name for path in after.keys() - before.keys()} <= {".lock"}
    assert {path: after[path] for path in before} == before


def test_a_folder_that_is_something_else_is_refused(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    with pytest.raises(RunFolderError, match=r"is a Hugging Face directory; choose another, with training.init_from="):
        pretrain(config(tmp_path / "hf", corpus))


def test_home_is_one_place(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = jax.config.jax_compilation_cache_dir
    kept = []
    for i in (1, 2):
        changes = {"run_dir": f"~/run{i}", "compilation_cache": f"~/xla{i}", "steps": 1}
        assert pretrain(config(tmp_path, corpus, training=changes)).folder == tmp_path / f"run{i}"
        kept.append(set((tmp_path / f"xla{i}").iterdir()))
    assert {"config.yaml", "tokenizer.json", "checkpoints"} <= {path.name for path in (tmp_path / "run1").iterdir()}
    assert not (tmp_path / "~").exists()
    assert kept[0] == set((tmp_path / "xla1").iterdir()) and min(map(len, kept)) > 0  # each run's cache is its own
    assert jax.config.jax_compilation_cache_dir == before


def test_a_moved_run_is_not_started_again_where_it_was(tmp_path: Path, whole: tuple[RunConfig, Summary]) -> None:
    shutil.copytree(whole[0].training.run_dir, tmp_path / "moved")
    file = tmp_path / "moved" / "config.yaml"
    named = rf"set training.run_dir={tmp_path / 'moved'} to resume the run in its folder"
    with pytest.raises(RunFolderError, match=named):
        check_in_place(load_config(file), file, [])
    for folder in (str(tmp_path / "moved"), whole[0].training.run_dir):
        overrides = [f"training.run_dir={folder}"]
        check_in_place(load_config(file, overrides), file, overrides)
    own = Path(whole[0].training.run_dir) / "config.yaml"
    check_in_place(load_config(own), own, [])


def test_nan_stops_with_the_step_and_keeps_the_last_good_checkpoint(tmp_path: Path, corpus: Path) -> None:
    settings = {"run_dir": str(tmp_path / "run"), "save_every": 1}
    run = config(tmp_path / "run", corpus, training=settings, optimizer={"learning_rate": 1e30, "clip_norm": None})
    with pytest.raises(TrainingStopped, match=r"at step \d+; the last good checkpoint is step \d+ in") as stop:
        pretrain(run)
    step, *params = final_params(run)
    assert f"at step {step + 1}; the last good checkpoint is step {step} in" in str(stop.value)
    assert all(np.isfinite(leaf).all() for leaf in params)
    assert all(np.isfinite(value) for value in losses(run).values())


def test_a_damaged_checkpoint_is_not_called_good(tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest is found damaged when the values go bad, so that the one before it is named."""
    run = config(tmp_path / "run", shared / "corpus", training={"save_every": 2, "eval_every": 100, "steps": 8})
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, run_dir=str(tmp_path / "run")))
    assert pretrain(run, stop_at=4).step == 4
    read = trainer._read

    def spoiled(run: trainer.Run, progress: trainer.Progress, pending: trainer.Pending | None) -> None:
        if pending is not None and pending.step == 7:
            run.checkpoints.wait()
            (tmp_path / "run" / "checkpoints" / "6" / "data" / "metadata").write_text("{")
            pending = pending._replace(metrics=pending.metrics._replace(loss=jnp.float32(math.nan)))
        read(run, progress, pending)

    monkeypatch.setattr(trainer, "_read", spoiled)
    with pytest.raises(
        TrainingStopped, match=r"with the parameters of step 4\) at step 7; the last good .* is step 4 in"
    ):
        pretrain(run)


def test_unwritable_run_dir_is_named(tmp_path: Path, corpus: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(RunFolderError, match=r"cannot write to training.run_dir .*choose a writable folder"):
        pretrain(config(blocked / "run", corpus))
    (tmp_path / "link").symlink_to(tmp_path / "missing")
    with pytest.raises(RunFolderError, match=r"link: a link to a folder that does not exist; choose"):
        pretrain(config(tmp_path / "link", corpus))


def test_wrong_dtype_is_refused_not_cast(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    checkpoints.save(1, {"x": jnp.arange(4.0)}, {})
    checkpoints.wait()
    with pytest.raises(CheckpointError, match=r"holds x as float32\[4\], this run needs bfloat16\[4\]"):
        checkpoints.restore({"x": jax.ShapeDtypeStruct((4,), jnp.bfloat16)})
    checkpoints.close()


@pytest.mark.parametrize("reopened", [False, True])
def test_newest_and_best_are_kept(tmp_path: Path, reopened: bool, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for step, loss in enumerate([3.0, 1.0, math.nan, None, 2.5, 2.2, None], start=1):
        checkpoints.save(step, {"x": jnp.full(3, step)}, {})
        checkpoints.wait()
        if reopened:  # another process has only what is written
            checkpoints.close()
            checkpoints = Checkpoints(tmp_path / "c", keep=2)
        checkpoints.evaluated(step, loss)  # later than the save, and by a new process from its record
    assert checkpoints.steps() == [2, 6, 7]
    checkpoints.close()
    assert not caplog.records


def test_without_an_evaluation_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for step in range(1, 5):
        checkpoints.save(step, {"x": jnp.full(3, step)}, {})
        checkpoints.wait()
    assert checkpoints.steps() == [3, 4]
    checkpoints.close()


def test_script_names_the_problem_and_prints_configs(tmp_path: Path, corpus: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(config(tmp_path / "run", corpus)))

    def script(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "scripts" / "pretrain.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ}, check=False)

    wrong = script(str(file), "training.step=3")
    assert wrong.returncode == 2 and "did you mean 'training.steps'" in wrong.stderr
    dashed = script(str(file), "--training.steps=3")
    assert dashed.returncode == 2 and "unknown --training.steps=3; write a setting without dashes" in dashed.stderr
    printed = script(str(file), "--print-config", "training.steps=3")
    assert printed.returncode == 0 and "steps: 3" in printed.stdout
    missing = script(str(file), f"data.path={tmp_path / 'nowhere'}")
    assert missing.returncode == 1 and "does not exist" in missing.stdout and "Traceback" not in missing.stderr
    helped = script("--help")
    assert "training.save_every (int, 100)" in helped.stdout


def test_init_is_jitted_and_seeded(tmp_path: Path, corpus: Path) -> None:
    model = build(config(tmp_path, corpus).model)
    a, b, c = (init_params(model, jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert not np.array_equal(a["embed"], c["embed"])
