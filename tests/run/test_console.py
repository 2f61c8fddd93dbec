"""The log of a run: one line per message, in terminals, files and pipes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from jaxllm.run import console
from jaxllm.run.parts import StepReport
from jaxllm.run.record import log_step
from jaxllm.training.train_step import StepMetrics
from tests.run.test_pretrain import config

ROW = {
    "loss": 5.12341,
    "bits_per_byte": 2.345,
    "grad_norm": 1.234,
    "learning_rate": 3e-4,
    "tokens_per_second": 119788.0,
}


def test_the_bar_shows_what_the_trainer_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[int, float]] = []
    monkeypatch.setattr(
        console.Progress, "update", lambda self, task, completed, loss, speed: moved.append((completed, loss))
    )
    metrics = StepMetrics(*([0.5] * len(StepMetrics._fields)))
    with console.training_console(config(tmp_path, tmp_path)) as show:
        show(StepReport(3, metrics, {}, lambda: None))
    assert moved == [(3, 0.5)]


def test_a_line_is_neither_wrapped_nor_padded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    with console.training_console(config(tmp_path, tmp_path)):
        log_step(config(tmp_path, tmp_path, training={"steps": 99999}), 65536, ROW)
        logging.getLogger("jaxllm.run").warning("[bold]%s[/bold]", "word " * 30)
    first, second, *rest = capsys.readouterr().out.split("\n")
    assert first[9:] == "step 65536 loss 5.123 bits/byte 2.345 grad 1.23 lr 3.0e-04 120k tok/s"
    assert len(first) <= 80 and second[9:] == f"[bold]{'word ' * 30}[/bold]" and rest == [""]
