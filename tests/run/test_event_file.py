"""TensorBoard's files hold the bytes that tensorboardX writes for the same events."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxllm.run.event_file import EventFile, crc32c
from jaxllm.run.record import MetricsWriter, read_metrics
from tests.conftest import full_disk

# By tensorboardX 2.6.5's EventsWriter at time 1700000000.25: version, a session's start, two scalars.
GOLDEN = bytes.fromhex(
    "1800000000000000a37f4b220900001040fc54d9411a0d627261696e2e4576656e743a32338d2fe9"
    "100000000000000095fbfe180900001040fc54d94110ad023a020801cb79b93b"
    "34000000000000005e33175c0900001040fc54d94110ad022a260a0b0a046c6f73731500002040"
    "0a170a1076616c69646174696f6e2f6cc3a4737315cdccccbdf85d9840"
)


def test_bytes_are_those_of_another_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720's check value
    monkeypatch.setattr(time, "time", lambda: 1700000000.25)
    file = EventFile(tmp_path, resume_step=300)
    file.write(301, {"loss": 2.5, "validation/läss": -0.1})
    (written,) = tmp_path.glob("*tfevents*")
    assert written.read_bytes() == GOLDEN  # before it is closed: each record is flushed
    file.close()


def test_a_clock_that_was_set_back_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads a folder's files by name, and voids what came before by each file's start."""
    for clock in (1700000000.25, 1600000000.0, 1700000000.25, 1800000000.0):
        before = {path.name for path in tmp_path.iterdir()}
        monkeypatch.setattr(time, "time", itertools.repeat(clock).__next__)
        EventFile(tmp_path, resume_step=3).close()
        (new,) = {path.name for path in tmp_path.iterdir()} - before
        assert new > max(before, default="")


def test_numbers_that_are_not_finite_are_null_and_not_drawn(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, resume_step=0)
    writer.write(1, {"loss": float("nan"), "steps": 3})
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None, "steps": 3}]
    (written,) = (tmp_path / "tensorboard").iterdir()
    assert b"steps" in written.read_bytes() and b"loss" not in written.read_bytes()


def test_a_start_that_cannot_write_leaves_the_record_as_it_was(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, resume_step=0)
    for step in range(1, 40):
        writer.write(step, {"loss": 1 / step})
    writer.close()
    path = tmp_path / "metrics.jsonl"
    rows, before, inode = read_metrics(path), path.read_bytes(), path.stat().st_ino
    with full_disk(), pytest.raises(OSError, match="File too large"):
        MetricsWriter(tmp_path, resume_step=20)
    assert path.read_bytes() == before
    MetricsWriter(tmp_path, resume_step=39).close()  # a finished run: there is nothing to write
    assert path.stat().st_ino == inode and path.read_bytes() == before
    with path.open("ab") as file:
        file.write(b'{"step": 40, "lo')  # a crash
    MetricsWriter(tmp_path, resume_step=20).close()
    assert read_metrics(path) == rows[:20] and path.read_bytes().endswith(b"\n")


def test_damaged_lines_cost_no_other_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": 1 / step, "name": "läss"} for step in range(1, 21)]
    other = [b"", b"{}", b"[]", b"3", b"null", b'{"step": "4"}', b'{"step": true}', b'{"step": 4.0}', b"\xff" * 9]
    other += [b"[" * 100_000, b'{"step": 1' + b"0" * 5000 + b"}", b"\x00" * 512]
    for _ in range(100):
        lines = [json.dumps(row).encode() for row in rows]
        bad = sorted(rng.choice(20, size=rng.integers(0, 6), replace=False).tolist())
        for i in bad:
            cut = lines[i][: rng.integers(1, len(lines[i]))]
            lines[i] = [cut, cut + bytes([rng.integers(128, 256)]) + lines[i][len(cut) + 1 :], *other][rng.integers(14)]
        path.write_bytes(b"\n".join(lines) + b"\n" * int(rng.integers(2)))
        good = [row for i, row in enumerate(rows) if i not in bad]
        named = [str(i + 1) for i in bad if lines[i]]
        caplog.clear()
        MetricsWriter(tmp_path, resume_step=18).close()
        assert [record.getMessage() for record in caplog.records] == (
            [f"{path}: {len(named)} damaged lines are left out: {', '.join(named)}"] if named else []
        )
        assert read_metrics(path) == [row for row in good if row["step"] <= 18]
        assert len(caplog.records) == bool(named)  # what was left out is named once


def test_the_trainer_imports_no_other_framework() -> None:
    """Importing torch costs seconds where it is installed, and nothing in a run needs it."""
    code = (
        "import sys, tempfile, pathlib, jaxllm.run.trainer, jaxllm.run.console\n"
        "from jaxllm.run.record import MetricsWriter, plot_curve\n"
        "folder = pathlib.Path(tempfile.mkdtemp())\n"
        "writer = MetricsWriter(folder, resume_step=0); writer.write(1, {'bits_per_byte': 1.0}); writer.close()\n"
        "plot_curve(folder, baselines={})\n"
        "print(sorted({'torch', 'tensorflow', 'transformers', 'datasets', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
