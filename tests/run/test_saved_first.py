"""What is saved when: before the evaluation of a step, by wall time, and with the sums of the rows of metrics.jsonl."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxllm.config import RunConfig
from jaxllm.host import processes
from jaxllm.host.device import Device
from jaxllm.run.parts import StepReport
from jaxllm.run.record import Sums, Throughput, add_step, count_rows, read_metrics, step_row
from jaxllm.run.steps import Steps
from jaxllm.run.trainer import pretrain
from jaxllm.storage.folder import checkpoint_steps
from jaxllm.training.train_step import StepMetrics
from tests.conftest import write_corpus
from tests.run.test_pretrain import config, final_params

TIMES = {"tokens_per_second", "tflops", "data_wait"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    write_corpus(folder / "corpus")
    return folder


def run_in(folder: Path, **training: Any) -> RunConfig:
    run = config(folder, folder.parent / "corpus", optimizer={"learning_rate": 0.01})
    return dataclasses.replace(run, training=dataclasses.replace(run.training, **training))


def rows_of(run: RunConfig) -> list[dict[str, Any]]:
    rows = read_metrics(Path(run.training.run_dir) / "metrics.jsonl")
    return [{name: row[name] for name in row.keys() - TIMES} for row in rows]


def kept(run: RunConfig) -> list[int]:
    return checkpoint_steps(Path(run.training.run_dir) / "checkpoints")


def failing_at(*steps: int) -> Callable[[int, dict[str, float], Any], None]:
    def on_evaluate(step: int, metrics: dict[str, float], params: Any) -> None:
        if step in steps:
            raise RuntimeError(f"evaluation of step {step}")

    return on_evaluate


def test_an_evaluation_that_fails_costs_no_step_and_is_made_by_the_next_start(shared: Path) -> None:
    """Also that of the last step, which is none of save_every, and by a run with several failures."""
    whole, broken = (run_in(shared / name, save_every=2, steps=7) for name in ("whole", "broken"))
    pretrain(whole)
    for step in (4, 4, 7):
        with pytest.raises(RuntimeError, match=f"evaluation of step {step}"):
            pretrain(broken, on_evaluate=failing_at(step))
        assert kept(broken)[-1] == step
    assert pretrain(broken)[:3] == (7, 7, True)
    assert rows_of(broken) == rows_of(whole)
    for a, b in zip(final_params(broken), final_params(whole), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_best_checkpoint_is_that_of_its_own_evaluation(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the run ends between a save and its evaluation, and when it has lost its metrics since."""
    losses = iter([3.0, 1.0, 2.0, None, 2.5, 2.25])

    def evaluate(steps: Steps, params: Any, pipeline: Any) -> dict[str, float]:
        loss = next(losses)
        if loss is None:
            raise RuntimeError("no evaluation")
        return {"loss": loss}

    monkeypatch.setattr("jaxllm.run.trainer.evaluate", evaluate)
    run = run_in(shared / "best", save_every=1, eval_every=1, keep=1, steps=5)
    with pytest.raises(RuntimeError, match="no evaluation"):
        pretrain(run)
    assert kept(run) == [2, 4]
    (shared / "best" / "metrics.jsonl").unlink()
    pretrain(run)
    assert kept(run) == [2, 5]


def test_a_checkpoint_is_saved_when_so_many_minutes_have_passed(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later = [0]
    monkeypatch.setattr(
        "jaxllm.storage.checkpoint.time", SimpleNamespace(monotonic=lambda: time.monotonic() + later[0])
    )

    def on_step(report: StepReport) -> None:
        later[0] += 30_000 if report.step in (2, 3, 5) else 0

    run = run_in(shared / "minutes", save_every=100, save_every_minutes=1000.0, keep=9)
    pretrain(run, on_step=on_step)
    assert kept(run) == [4, 8]


def test_runs_of_one_program_do_not_share_the_request_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several processes; a stand-in has the values that the coordination service would have."""
    values: dict[str, str] = {}

    def get(key: str) -> str:
        if key not in values:
            raise RuntimeError(f"NOT_FOUND: {key}")
        return values[key]

    service = SimpleNamespace(key_value_try_get=get, key_value_set=lambda key, value, **_: values.update({key: value}))
    monkeypatch.setattr(processes, "_client", lambda: service)
    first, second = processes.unique_prefix(), processes.unique_prefix()
    assert not processes.agreed(first, 8, True)
    assert processes.agreed(first, 16, False) and not processes.agreed(second, 16, False)
    assert not processes.agreed(first, 24, False)


@pytest.mark.parametrize("stops", [(4,), (2, 5, 7)])
def test_rows_are_means_since_the_last_one_also_across_starts(shared: Path, stops: tuple[int, ...]) -> None:
    reports: list[StepReport] = []
    name = "-".join(map(str, stops))
    whole, parts = (run_in(shared / f"{kind}{name}", log_every=3) for kind in ("rows", "parts"))
    pretrain(whole, on_step=reports.append)
    for stop in (*stops, None):
        pretrain(parts, stop_at=stop)
    assert [row for row in rows_of(parts) if "loss" in row] == [row for row in rows_of(whole) if "loss" in row]
    rows = {row["step"]: row for row in rows_of(whole) if "loss" in row}
    assert list(rows) == [1, 3, 6]
    for last, first in ((1, 1), (3, 2), (6, 4)):
        span = [report.metrics for report in reports if first <= report.step <= last]
        weights = [values.weight for values in span]
        for column in ("loss", "accuracy"):
            mean = np.average([getattr(values, column) for values in span], weights=weights)
            assert rows[last][column] == pytest.approx(mean, rel=1e-12)
        assert rows[last]["grad_norm"] == pytest.approx(np.mean([values.grad_norm for values in span]), rel=1e-12)


def test_speed_is_right_where_two_steps_are_read_at_once(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 2 s; the host computes, so that a step is done when the one before it is read."""
    now = [0.0]
    monkeypatch.setattr("jaxllm.run.record.time", SimpleNamespace(perf_counter=lambda: now[0]))
    meter = Throughput(run_in(shared / "speed"), (32, 0), Device("cpu", "", 1, None, None))
    now[0] = 1000.0  # restoring and compiling
    meter.start()
    speeds = []
    for step, done in ((1, 2), (2, 3), (3, 3), (4, 5)):
        now[0] = 1000.0 + 2 * done
        meter.add(step, 100.0)
        if done > step:
            meter.add(done, 100.0)
        speeds.append(meter.read()["tokens_per_second"])
    assert speeds == [50.0] * 4


def test_rows_are_counted_on_both_sides_without_padding() -> None:
    sizes = np.array([0, 3, 5])
    row = {"weights": np.array([[1, 1, 0.5, 0], [1, 0, 0, 0]], np.float32), "tokens": np.ones((2, 4))}
    row["targets"] = np.array([[1, 2, 2, 0], [1, 1, 1, 1]])
    assert count_rows(row, sizes).tolist() == [[3, 10.5], [1, 3]]
    sides = {"encoder_tokens": np.ones((2, 4)), "encoder_segment_ids": np.array([[1, 1, 2, 2], [1, 0, 0, 0]])}
    assert count_rows({**row, "decoder_segment_ids": np.ones((2, 4)), **sides}, sizes)[:, 0].tolist() == [7, 2]


def test_a_mean_over_no_token_is_nan(tmp_path: Path) -> None:
    run, sums = run_in(tmp_path / "run"), Sums()
    none = StepMetrics(*([0.0] * len(StepMetrics._fields)))
    add_step(sums, run, none._replace(grad_norm=2.0), size=0.0)
    row = step_row(run, none, sums=sums, learning_rate=0.1, speed={})
    assert row["grad_norm"] == 2 and np.isnan([row[name] for name in ("loss", "bits_per_byte", "accuracy")]).all()


def test_the_last_row_and_the_first_after_a_resume_have_the_speed_of_their_steps(shared: Path) -> None:
    run = run_in(shared / "fast", log_every=1, steps=8)
    pretrain(run, stop_at=4)
    speeds = {row["step"]: row["tokens_per_second"] for row in pretrain(run).metrics if "loss" in row}
    assert list(speeds) == list(range(1, 9))
    usual = float(np.median(list(speeds.values())))
    assert all(usual / 20 < speeds[step] < 20 * usual for step in (4, 5, 8))
