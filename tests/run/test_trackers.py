"""The rows of a run: metrics.jsonl survives damage, and trackers repeat it without gaps, and without ending a run."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import struct
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxllm.config import RunConfig
from jaxllm.config.file import ConfigError
from jaxllm.run.record import MetricsWriter, read_metrics
from jaxllm.run.trainer import pretrain
from tests.conftest import full_disk, write_corpus
from tests.run.test_pretrain import config

needs_tensorboardx = pytest.mark.skipif(
    importlib.util.find_spec("tensorboardX") is None, reason="tensorboardX (extra tensorboard) is not installed"
)


def with_trackers(folder: Path, *names: str) -> RunConfig:
    return config(folder / "run", folder / "corpus", training={"run_dir": str(folder), "trackers": list(names)})


def fields(data: bytes) -> list[tuple[int, Any]]:
    """A message of protobuf by its wire format: (number of the field, integer or bytes)."""
    found, at = [], 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            found.append((number, varint()))
        else:
            size = {1: 8, 5: 4}.get(kind) or varint()
            found.append((number, data[at : at + size]))
            at += size
    return found


def crc32c(data: bytes) -> int:
    """Castagnoli's checksum, RFC 3720 appendix B.4."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def scalars(folder: Path) -> list[tuple[int, str, float]]:
    """(step, tag, value) of the event files of a folder, read without the library that wrote them."""
    found = []
    for path in sorted(folder.glob("*tfevents*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,), (check,) = struct.unpack("<Q", data[at : at + 8]), struct.unpack("<I", data[at + 8 : at + 12])
            body = data[at + 12 : at + 12 + size]
            assert check == masked(data[at : at + 8])
            assert struct.unpack("<I", data[at + 12 + size : at + 16 + size])[0] == masked(body)
            at += 16 + size
            event = dict(fields(body))
            for _, value in fields(event.get(5, b"")):
                parts = dict(fields(value))
                found.append((event[2], parts[1].decode(), struct.unpack("<f", parts[2])[0]))
    return found


def numbers(folder: Path) -> list[tuple[int, str, float]]:
    """The same of metrics.jsonl."""
    rows = read_metrics(folder / "metrics.jsonl")
    listed = [(row["step"], name, value) for row in rows for name, value in row.items() if name != "step"]
    return [(step, name, np.float32(value)) for step, name, value in listed if isinstance(value, int | float)]


@needs_tensorboardx
def test_tensorboards_file_repeats_the_record_also_after_a_kill_and_when_it_is_chosen_late(tmp_path: Path) -> None:
    run = with_trackers(tmp_path, "tensorboard")
    board = tmp_path / "tensorboard"
    writer = MetricsWriter(tmp_path, resume_step=0)
    for step in range(1, 4):
        writer.write(step, {"loss": 1 / step, "fingerprint": "ab", "läss": float("nan")})
    writer.close()
    killed = []  # closed after the comparison
    for resume in (3, 3, 5):  # the first start with TensorBoard has the rows before it
        writer = MetricsWriter(tmp_path, resume_step=resume, config=run)
        for step in range(resume + 1, resume + 5):
            writer.write(step, {"loss": 1 / step, "validation/läss": -0.1, "steps": 3})
            assert scalars(board) == numbers(tmp_path)  # before it is closed, so also after a kill
        killed.append(writer)
    found = scalars(board)
    assert [step for step, name, _ in found if name == "loss"] == list(range(1, 10))
    assert len(list(board.iterdir())) == 1
    for writer in killed:
        writer.close()


@needs_tensorboardx
def test_a_clock_that_was_set_back_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A running TensorBoard reads a folder's files by name, and none before the last."""
    before = ""
    for step, clock in enumerate((1700000000.25, 1600000000.0, 1700000000.25, 1800000000.0), start=1):
        monkeypatch.setattr(time, "time", itertools.repeat(clock).__next__)
        writer = MetricsWriter(tmp_path, resume_step=step, config=with_trackers(tmp_path, "tensorboard"))
        writer.write(step, {"loss": 1.0})
        writer.close()
        (new,) = (tmp_path / "tensorboard").iterdir()
        assert new.name > before
        before = new.name
    assert [step for step, _, _ in scalars(tmp_path / "tensorboard")] == [1, 2, 3, 4]


@needs_tensorboardx
def test_tensorboard_reads_the_file(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start in (0, 2):
        writer = MetricsWriter(tmp_path, resume_step=start, config=with_trackers(tmp_path, "tensorboard"))
        for step in range(start + 1, start + 4):
            writer.write(step, {"loss": 1 / step})
        writer.close()
    read = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [
        (step, np.float32(1 / step)) for step in range(1, 6)
    ]


@needs_tensorboardx
def test_a_full_disk_drops_tensorboard_and_the_next_start_has_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = with_trackers(tmp_path, "tensorboard")
    writer = MetricsWriter(tmp_path, resume_step=0, config=run)
    with full_disk():
        for step in range(1, 100):
            writer.write(step, {f"loss{i}": 1.0 for i in range(300)})
    writer.close()
    dropped = [record for record in caplog.records if "tracker tensorboard is dropped" in record.getMessage()]
    assert len(dropped) == 1
    MetricsWriter(tmp_path, resume_step=99, config=run).close()
    assert (
        scalars(tmp_path / "tensorboard") == numbers(tmp_path) and len(read_metrics(tmp_path / "metrics.jsonl")) == 99
    )


class StandIn(types.ModuleType):
    """Records what is asked of W&B: one run per id, which starts at the step after its last."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.util.spec_from_loader("wandb", None)
        self.arguments: list[dict[str, Any]] = []
        self.logged: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        self.finished = 0

    def init(self, **arguments: Any) -> Any:
        self.arguments.append(arguments)
        rows = self.logged.setdefault(arguments["id"], [])
        run = types.SimpleNamespace(step=rows[-1][0] + 1 if rows else 0)

        def log(values: dict[str, Any], *, step: int) -> None:
            assert step >= run.step, "W&B drops it"
            run.step = step
            rows.append((step, values))

        def finish() -> None:
            self.finished += 1

        run.log, run.finish = log, finish
        return run


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    module = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    return module


def test_wandb_gets_the_config_and_the_rows_and_a_resume_continues_its_run(
    tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path / "corpus")
    run = config(tmp_path / "run", tmp_path / "corpus", training={"trackers": ["wandb"], "sample_tokens": 0})
    pretrain(run, stop_at=6)
    ((name, rows),) = stand_in.logged.items()
    assert name == (tmp_path / "run" / "wandb_id").read_text()
    del rows[-2:]  # a killed process did not send its last rows, of steps 5 and 6
    assert rows[-1][0] in (4, 5)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    summary = pretrain(run)
    assert stand_in.finished == 2 and list(stand_in.logged) == [name]
    first, second = stand_in.arguments
    assert first | {"project": "mine"} == second
    assert first == {
        "project": "jaxllm",
        "name": "run",
        "id": name,
        "resume": "allow",
        "dir": str(tmp_path / "run"),
        "config": dataclasses.asdict(run),
    }
    assert {step for step, _ in rows} == {row["step"] for row in summary.metrics}
    losses = {row["step"]: row["loss"] for row in summary.metrics if "loss" in row}
    assert {step: values["loss"] for step, values in rows if "loss" in values} == losses
    assert all(isinstance(value, int | float) for _, values in rows for value in values.values())


def test_a_library_that_is_missing_is_named_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, library in (("wandb", "wandb"), ("tensorboard", "tensorboardX")):
        with pytest.raises(ConfigError, match=f"needs {library}: pip install {library}$"):
            pretrain(with_trackers(tmp_path / name, name))
        assert not (tmp_path / name).exists()


def test_names_of_trackers_are_checked(tmp_path: Path) -> None:
    for names, message in ((("tensorbord",), "must be one of tensorboard, wandb"), (("wandb",) * 2, "a name twice")):
        with pytest.raises(ValueError, match=message):
            with_trackers(tmp_path, *names)


@pytest.mark.parametrize("when", ["init", "log", "finish"])
def test_a_tracker_that_raises_is_dropped_after_one_warning(
    when: str, tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise OSError("no network")

    given = StandIn.init

    def init(**arguments: Any) -> Any:
        run = given(stand_in, **arguments)
        setattr(run, when, broken)
        return run

    monkeypatch.setattr(stand_in, "init", broken if when == "init" else init)
    seen: list[int] = []
    writer = MetricsWriter(
        tmp_path, resume_step=0, config=with_trackers(tmp_path, "wandb"), tracker=lambda step, row: seen.append(step)
    )
    for step in (1, 2, 3):
        writer.write(step, {"loss": 1.0})
    writer.close()
    (warning,) = (record.getMessage() for record in caplog.records)
    assert "the tracker wandb is dropped" in warning and "no network" in warning
    assert seen == [1, 2, 3] == [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")]


def test_a_callers_tracker_gets_new_rows_and_cannot_end_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_corpus(tmp_path / "corpus")
    run = config(tmp_path / "run", tmp_path / "corpus", training={"sample_tokens": 0, "steps": 4})
    seen: list[dict[str, Any]] = []

    def track(step: int, row: Any) -> None:
        seen.append({"step": step, **row})
        if step == 3:
            raise RuntimeError("mine")

    summary = pretrain(run, tracker=track)
    assert summary.finished and seen == summary.metrics[:3]
    assert "the tracker given to pretrain is dropped" in caplog.text


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, resume_step=0)
    writer.write(1, {"loss": float("nan"), "steps": 3})
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None, "steps": 3}]


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
        "others = {'torch', 'tensorflow', 'transformers', 'datasets', 'pandas', 'wandb', 'tensorboardX'}\n"
        "print(sorted(others & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
