"""The profiler window: traces the steps that were asked for, shows their kernels, and changes nothing."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.profiler import ProfileData

from jaxllm.run.profile import kernels
from jaxllm.run.trainer import pretrain
from tests.conftest import write_corpus
from tests.run.test_pretrain import config, final_params


def traced_steps(folder: Path) -> list[list[int]]:
    """Of each trace, the numbers of its annotated steps, read by jax alone."""
    found = []
    for path in sorted(folder.rglob("*.xplane.pb")):
        events = [e for p in ProfileData.from_file(str(path)).planes for line in p.lines for e in line.events]
        found.append(sorted(int(dict(e.stats)["step_num"]) for e in events if e.name == "train"))
    return found


def test_the_steps_of_the_window_are_traced_and_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_corpus(tmp_path / "corpus")
    caplog.set_level(logging.INFO, logger="jaxllm")
    settings = {"sample_tokens": 0, "eval_every": 8, "save_every": 8}
    plain = config(tmp_path / "plain", tmp_path / "corpus", training=settings)
    pretrain(plain)
    assert not (tmp_path / "plain" / "profile").exists() and "profile of" not in caplog.text
    run = config(tmp_path / "run", tmp_path / "corpus", training={**settings, "profile": [3, 5]})
    pretrain(run)
    assert traced_steps(tmp_path / "run" / "profile") == [[3, 4, 5]]
    (shown,) = (r.getMessage() for r in caplog.records if r.getMessage().startswith("profile of"))
    head, *rows = shown.splitlines()
    assert head.startswith(f"profile of 3 steps on cpu in {tmp_path / 'run' / 'profile'}: ")
    assert len(rows) == 12 and "jit(train_step)" in shown
    listed = [float(row.split()[0]) for row in rows]
    assert listed == sorted(listed, reverse=True) and listed[0] > 0
    found = kernels(tmp_path / "run" / "profile", 3)
    # Each step runs the same products: nothing of the step before is in the trace.
    assert all(".0x" in row for row in rows if "dot_general" in row or "softmax" in row)
    assert f"{found.step_milliseconds:.3f} ms a step" in head
    for a, b in zip(final_params(plain), final_params(run), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_window_that_a_stop_cuts_is_shown_and_a_resume_traces_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_corpus(tmp_path / "corpus")
    caplog.set_level(logging.INFO, logger="jaxllm")
    run = config(tmp_path / "run", tmp_path / "corpus", training={"sample_tokens": 0, "profile": [4, 6]})
    pretrain(run, stop_at=4)
    pretrain(run)
    assert traced_steps(tmp_path / "run" / "profile") == [[4], [5, 6]]
    assert "profile of 1 steps" in caplog.text and "profile of 2 steps" in caplog.text


@pytest.mark.parametrize("window", [[5, 3], [0, 3], [3, 9], [3], [1, 2, 3], [9, 9]])
def test_a_window_outside_the_run_is_refused(window: list[int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"profile must be null or \[first, last\] with 1 <= first <= last <= steps 8"):
        config(tmp_path / "run", tmp_path / "corpus", training={"profile": window})


def test_reading_the_trace_is_not_time_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "corpus")
    stop_trace, pause = jax.profiler.stop_trace, 6.0
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: (time.sleep(pause), stop_trace()))
    settings = {"sample_tokens": 0, "log_every": 1, "profile": [3, 4]}
    run = config(tmp_path / "run", tmp_path / "corpus", training=settings)
    rows = pretrain(run).metrics
    tokens = run.training.batch_size * run.data.sequence_length
    speeds = {row["step"]: row["tokens_per_second"] for row in rows if "tokens_per_second" in row}
    assert len(speeds) == run.training.steps and min(speeds.values()) > tokens / pause
