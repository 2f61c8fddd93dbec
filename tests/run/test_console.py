"""The log of a run: one line per message, in terminals, files and pipes."""

from __future__ import annotations

import errno
import io
import logging
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxllm.host.signals import stop_signals
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


class Output(io.RawIOBase):
    """The raw output under the log: its first write fails, or a signal arrives during that write."""

    def __init__(self, *, number: int = 0) -> None:
        self.data, self._number, self._calls = b"", number, 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._calls += 1
        if self._calls == 1 and not self._number:
            raise OSError(errno.ENOSPC, "No space left on device")
        if self._calls == 1:
            signal.raise_signal(self._number)
        self.data += bytes(data)
        return len(data)


def test_a_full_disk_under_the_log_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(output)))
    with console.training_console(config(tmp_path, tmp_path)):
        for line in ("first", "second"):
            logging.getLogger("jaxllm.run").info(line)
        sys.stdout.flush()
    assert b"first" in output.data and b"second" in output.data  # once there is space


def test_a_stop_signal_while_a_line_waits_for_its_reader_stops_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Output(number=signal.SIGTERM)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(output)))
    with console.training_console(config(tmp_path, tmp_path)), stop_signals() as stopped:
        logging.getLogger("jaxllm.run").info("a line")
        assert stopped()
        logging.getLogger("jaxllm.run").info("another")
    assert b"a line" in output.data and b"another" in output.data
