"""A save that fails is tried again and costs no checkpoint that is whole; what was saved survives a power loss."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import RunConfig
from jaxllm.data import durable
from jaxllm.data.durable import Appended, move, write_whole
from jaxllm.run.record import MetricsWriter
from jaxllm.run.trainer import pretrain
from jaxllm.storage import checkpoint
from jaxllm.storage.checkpoint import CheckpointError, Checkpoints
from tests.conftest import write_corpus
from tests.run.test_pretrain import config, final_params

CAUSES = [errno.ENOSPC, errno.EIO, errno.ESTALE]


def state(step: int) -> dict[str, jax.Array]:
    return {"x": jnp.full(4, float(step))}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Checkpoints]:
    opened = Checkpoints(tmp_path / "c", keep=2)
    yield opened
    opened.close()


def save(checkpoints: Checkpoints, step: int) -> None:
    checkpoints.save(step, state(step), {"at": step})
    checkpoints.wait()


class Faults:
    """Makes chosen steps fail where orbax gives a checkpoint its name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at: dict[str, int] = {}
        self.late = False  # after the rename, as a file system over a network may report it
        whole = checkpoint.Durable.finalize

        async def finalize(path: Any) -> None:
            code = self.at.get(Path(path.get_final()).name)
            if code is not None and not self.late:
                raise OSError(code, os.strerror(code))
            await whole(path)
            if code is not None:
                raise OSError(code, os.strerror(code))

        monkeypatch.setattr(checkpoint.Durable, "finalize", finalize)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    return Faults(monkeypatch)


def whole_steps(checkpoints: Checkpoints) -> list[int]:
    """What another process finds."""
    return sorted(int(path.name) for path in checkpoints.folder.iterdir() if path.name.isdigit())


@pytest.mark.parametrize("code", CAUSES, ids=errno.errorcode.__getitem__)
def test_a_failed_save_names_its_step_and_keeps_older_checkpoints(
    checkpoints: Checkpoints, faults: Faults, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        save(checkpoints, step)
    faults.at = {"3": code}
    with caplog.at_level("WARNING", logger="jaxllm"):
        save(checkpoints, 3)
    words = [record.message for record in caplog.records if record.name.startswith("jaxllm")]
    assert len(words) == 1 and words[0].startswith("step 3 is not saved in ")
    assert f"({os.strerror(code)}); the next save tries again" in words[0]
    assert checkpoints.steps() == whole_steps(checkpoints) == [1, 2]
    assert not list(checkpoints.folder.glob("*tmp*"))  # what is left of it would fill the disk
    save(checkpoints, 4)
    assert checkpoints.steps() == whole_steps(checkpoints) == [2, 4]
    restored = checkpoints.restore(jax.eval_shape(lambda: state(4)))
    assert restored is not None and restored.step == 4


def test_a_save_that_cannot_be_started_is_tried_again(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(checkpoints, 1)

    def full(*_: object, **__: object) -> None:
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write 83 bytes: No space left on device [os_error_code='28']")

    with monkeypatch.context() as patch, caplog.at_level("WARNING", logger="jaxllm"):
        patch.setattr(checkpoints._manager, "save", full)
        save(checkpoints, 2)
    assert "step 2 is not saved" in caplog.text and "(No space left on device)" in caplog.text
    save(checkpoints, 3)
    assert checkpoints.steps() == whole_steps(checkpoints) == [1, 3]


def test_the_third_failure_in_a_row_is_an_error_with_advice(checkpoints: Checkpoints, faults: Faults) -> None:
    save(checkpoints, 1)
    faults.at = dict.fromkeys("23567", errno.ENOSPC)
    for step in (2, 3, 4, 5, 6):  # 4 is saved, so that the count starts again
        save(checkpoints, step)
    with pytest.raises(CheckpointError, match=r"^step 7 .*\(No space .*\), and 3 saves in a row .* from step 4$"):
        save(checkpoints, 7)
    assert whole_steps(checkpoints) == [1, 4]


def test_a_failure_in_the_background_is_reported_between_steps(
    checkpoints: Checkpoints, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    faults.at = {"1": errno.EIO}
    with caplog.at_level("WARNING", logger="jaxllm"):
        checkpoints.save(1, state(1), {})
        while not caplog.records or "step 1 is not saved" not in caplog.text:
            checkpoints.poll()
    assert checkpoints.steps() == []


def test_a_rename_that_was_done_after_all_is_no_failure(
    checkpoints: Checkpoints, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    faults.at, faults.late = dict.fromkeys("1234", errno.ESTALE), True
    with caplog.at_level("WARNING", logger="jaxllm"):
        for step in (1, 2, 3, 4):
            save(checkpoints, step)
    assert "is not saved" not in caplog.text and checkpoints.steps()[-1] == whole_steps(checkpoints)[-1] == 4


def rows(run: RunConfig) -> list[dict[str, Any]]:
    lines = (Path(run.training.run_dir) / "metrics.jsonl").read_text().splitlines()
    speed = ("tokens_per_second", "tflops", "data_wait")
    return [{key: value for key, value in json.loads(line).items() if key not in speed} for line in lines]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished run that no save of fails."""
    folder = tmp_path_factory.mktemp("whole")
    write_corpus(folder / "corpus")
    settings = {"run_dir": str(folder / "run"), "steps": 6, "save_every": 1, "eval_every": 3, "sample_tokens": 0}
    run = config(folder / "run", folder / "corpus", training=settings)
    pretrain(run)
    return run


def again(run: RunConfig, folder: Path) -> RunConfig:
    return dataclasses.replace(run, training=dataclasses.replace(run.training, run_dir=str(folder)))


def test_a_run_with_failed_saves_ends_as_without(
    small: RunConfig, tmp_path: Path, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    faults.at = {"2": errno.ESTALE, "4": errno.ENOSPC, "5": errno.ENOSPC}
    run = again(small, tmp_path / "run")
    with caplog.at_level("WARNING", logger="jaxllm"):
        assert pretrain(run).finished
    assert caplog.text.count("is not saved") == 3
    assert rows(run) == rows(small)
    for a, b in zip(final_params(run), final_params(small), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_last_save_is_tried_three_times_and_then_ends_the_run(
    small: RunConfig, tmp_path: Path, faults: Faults
) -> None:
    faults.at = {"6": errno.ENOSPC}
    run = again(small, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"^step 6 .*run the same command, which resumes from step 5$"):
        pretrain(run)
    faults.at = {}
    assert pretrain(run)[:3] == (6, 5, True)
    assert rows(run) == rows(small)


def test_a_row_that_a_full_disk_refuses_is_written_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Full:
        name, free, data = str(tmp_path / "file"), 5, b""

        def write(self, data: bytes) -> int:
            if not self.free:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken = data[: self.free]
            self.free, self.data = self.free - len(taken), self.data + taken
            return len(taken)

        def close(self) -> None:
            pass

    file = Appended(tmp_path / "file")
    file._file.close()
    file._file = full = Full()
    with caplog.at_level("WARNING", logger="jaxllm"):
        for data in (b"first\n", b"second\n", b"third\n"):
            file.write(data)
    assert full.data == b"first" and len(caplog.records) == 1
    full.free = 100
    file.close()
    assert full.data == b"first\nsecond\nthird\n"


def test_a_write_that_ctrl_c_ends_is_not_repeated(tmp_path: Path) -> None:
    class Interrupted(FileIO):
        def write(self, data: Any) -> int:
            super().write(data)
            raise KeyboardInterrupt

    file = Appended(tmp_path / "file")
    file._file.close()
    file._file = Interrupted(tmp_path / "file", "ab")
    with pytest.raises(KeyboardInterrupt):
        file.write(b"row\n")
    file.close()
    assert (tmp_path / "file").read_bytes() == b"row\n"


class Calls:
    """The order in which files and folders reach the disk and get their names."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.made: list[tuple[str, str]] = []
        self._folder = folder
        fsync = os.fsync

        def synced(descriptor: int) -> None:
            self._add("sync", os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", synced)
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, self._renaming(getattr(os, name)))

    def _renaming(self, rename: Any) -> Any:
        def renamed(source: Any, target: Any, **options: Any) -> None:
            rename(source, target, **options)
            self._add("rename", str(target))

        return renamed

    def _add(self, kind: str, path: str) -> None:
        if path.startswith(str(self._folder)):
            self.made.append((kind, os.path.relpath(path, self._folder)))


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of descriptors")


@needs_proc
def test_bytes_reach_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    calls = Calls(monkeypatch, tmp_path)
    write_whole(tmp_path / "file.json", b"{}")
    assert calls.made == [("sync", "file.partial"), ("rename", "file.json"), ("sync", ".")]
    calls.made.clear()
    move(tmp_path / "file.json", tmp_path / "other" / "file.json")
    assert calls.made[0] == ("rename", "other/file.json")
    assert sorted(calls.made[1:]) == [("sync", "."), ("sync", "other")]


def test_a_file_system_that_syncs_no_folder_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[int] = []

    def refuses(file: int) -> None:
        refused.append(file)
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuses)
    durable.sync(tmp_path)
    assert len(refused) == 1


@needs_proc
def test_a_checkpoint_is_on_disk_before_it_has_its_name_and_before_older_ones_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    save(checkpoints, 1)
    calls = Calls(monkeypatch, tmp_path / "c")
    delete = checkpoints._manager._checkpoint_deleter.delete_steps
    monkeypatch.setattr(
        checkpoints._manager._checkpoint_deleter,
        "delete_steps",
        lambda steps: (calls.made.append(("delete", str(steps))), delete(steps)),
    )
    save(checkpoints, 2)
    checkpoints.close()
    named = calls.made.index(("rename", "2"))
    before, after = calls.made[:named], calls.made[named:]
    unfinished = "2.orbax-checkpoint-tmp"
    files = [path.relative_to(tmp_path / "c" / "2") for path in (tmp_path / "c" / "2").rglob("*")]
    late = {Path("commit_success.txt")}  # orbax writes it with the name
    assert {("sync", f"{unfinished}/{path}") for path in files if path not in late} <= set(before)
    gone = after.index(("delete", "[1]"))
    for path in ("2/_CHECKPOINT_METADATA", "2/commit_success.txt", "2", "."):
        assert after.index(("sync", path)) < gone


@needs_proc
def test_rows_are_on_disk_before_the_checkpoint_of_their_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, checkpoints = MetricsWriter(tmp_path, resume_step=0), Checkpoints(tmp_path / "c", keep=2)
    writer.write(1, {"loss": 2.5})
    calls = Calls(monkeypatch, tmp_path)
    checkpoints.save(1, state(1), {}, functools.partial(writer.write_fingerprint, 1))
    checkpoints.close()
    writer.close()
    assert calls.made.index(("sync", "metrics.jsonl")) < calls.made.index(("rename", "c/1"))


def test_a_record_that_cannot_be_synced_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    file = Appended(tmp_path / "file")
    file.write(b"row\n")
    file.sync()
    assert "file cannot be synced (Input/output error)" in caplog.text
    file.close()


def test_traces_of_a_failed_save_are_not_in_the_log_of_a_script(tmp_path: Path) -> None:
    """In a process of its own, as they are hidden for all of it. Its limit of file sizes is what fails."""
    program = f"""
import logging, resource
from pathlib import Path
import jax.numpy as jnp
from process import hide_traces
from jaxllm.storage.checkpoint import Checkpoints
hide_traces()
logging.basicConfig(level=logging.WARNING)
checkpoints = Checkpoints(Path({str(tmp_path)!r}) / "c", keep=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
checkpoints.save(1, {{str(i): jnp.arange(4096.0) ** i for i in range(8)}}, {{}})
checkpoints.close()
"""
    done = run_beside_scripts(program)
    assert done.returncode == 0 and "step 1 is not saved" in done.stderr
    assert "Traceback" not in done.stderr and "Error" not in done.stderr


def test_ctrl_c_within_a_destructor_ends_a_script_as_elsewhere() -> None:
    """Python reports what a destructor raises, and goes on: the interrupt would be a trace and then be lost."""
    done = run_beside_scripts(
        """
import signal, time
from interrupts import interruptible
from process import hide_traces

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it

class Interrupted:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

@interruptible
def main():
    hide_traces()
    Interrupted()
    time.sleep(100)
    return 0

raise SystemExit(main())
"""
    )
    assert (done.returncode, done.stderr) == (130, "")


def run_beside_scripts(program: str) -> subprocess.CompletedProcess[str]:
    """A Python program with `scripts/` on its path."""
    scripts = Path(__file__).parent.parent.parent / "scripts"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(scripts), str(scripts.parent)])}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
