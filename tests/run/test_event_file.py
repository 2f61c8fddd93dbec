"""TensorBoard's files hold the bytes that tensorboardX writes for the same events."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

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
