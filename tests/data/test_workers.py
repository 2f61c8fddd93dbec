"""Workers change no batch and end with the run; their failures and bad records become one clear sentence."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jaxllm.config import DataConfig
from jaxllm.data import BatchError, DataError, workers
from jaxllm.data.packing import Batch
from jaxllm.data.pipeline import Pipeline
from jaxllm.run.feed import build_pipeline

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def opened(corpus: Path, run_dir: Path, **changes: object) -> Iterator[Pipeline]:
    options = {"source": "files", "path": str(corpus), "sequence_length": 32, "validation_fraction": 0.2, **changes}
    config = DataConfig(**{"cache_dir": str(run_dir.parent / "cache"), **options})
    with contextlib.closing(build_pipeline(config, vocab_size=420, batch_size=4, seed=3, run_dir=run_dir)) as pipeline:
        yield pipeline


def read(pipeline: Pipeline, count: int) -> list[tuple[Batch, str]]:
    """Batches, each with the position after it."""
    batches = itertools.islice(pipeline, count)
    return [(batch, json.dumps(pipeline.get_state(), sort_keys=True)) for batch in batches]


def assert_same(found: list[tuple[Batch, str]], wanted: list[tuple[Batch, str]]) -> None:
    for (batch, position), (other, expected) in zip(found, wanted, strict=True):
        assert position == expected and batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], strict=True)


@pytest.mark.parametrize("objective", ["causal", "ul2"])
def test_any_number_of_workers_gives_the_same_batches(corpus: Path, tmp_path: Path, objective: str) -> None:
    """Also after a resume with another number, in the middle of a window and of a cut."""
    shape = {"objective": objective, **({"target_length": 32, "example_length": 32} if objective == "ul2" else {})}
    with opened(corpus, tmp_path / "run", **shape) as pipeline:
        wanted = read(pipeline, 150)
    for count in (1, 2, 8) if objective == "causal" else (2,):
        with opened(corpus, tmp_path / "run", workers=count, **shape) as pipeline:
            assert_same(read(pipeline, 75), wanted[:75])
            pipeline.set_state(json.loads(wanted[19][1]))
            assert_same(read(pipeline, 5), wanted[20:25])
    with opened(corpus, tmp_path / "run", **shape) as pipeline:
        pipeline.set_state(json.loads(wanted[74][1]))
        assert_same(read(pipeline, 75), wanted[75:])


def test_a_position_of_the_earlier_order_is_refused(corpus: Path, tmp_path: Path) -> None:
    """Until 2026-11 each worker read its own documents and made whole batches."""
    with opened(corpus, tmp_path / "run") as pipeline:
        state = pipeline.get_state()
        pipeline.set_state({**state, "workers": 0})
        with pytest.raises(DataError, match=r"data depends on data\.workers=2; start another"):
            pipeline.set_state({**state, "workers": 2})


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_stopped_worker_is_named(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals
) -> None:
    with opened(corpus, tmp_path / "run", workers=1) as pipeline:
        first = read(pipeline, 1)
        monkeypatch.setattr(workers, "TIME_LIMIT", 1.0)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, sent)
        done = "answered for 1 s; it was to read" if sent == signal.SIGSTOP else r"ended \(signal 9, as when memory"
        where = rf"\d+ documents of {tmp_path}/cache/\S*-train.array_record\S*"
        with pytest.raises(BatchError, match=rf"worker process {worker.pid} .*{done}.*{where}.*the same command again"):
            read(pipeline, 2000)
    assert not multiprocessing.active_children()
    with opened(corpus, tmp_path / "run") as pipeline:  # positions from before stay good
        pipeline.set_state(json.loads(first[0][1]))
        read(pipeline, 1)


SCRIPT = """
import multiprocessing, os, sys, time
from jaxllm.config import DataConfig
from jaxllm.run.feed import build_pipeline
if __name__ == "__main__":
    corpus, run, end = sys.argv[1:]
    config = DataConfig(source="files", path=corpus, sequence_length=32, validation_fraction=0.2, workers=2)
    pipeline = build_pipeline(config, vocab_size=420, batch_size=4, seed=3, run_dir=run)
    next(pipeline)
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    if end == "close":
        pipeline.close()
    elif end == "never":
        time.sleep(600)
"""


def run(corpus: Path, folder: Path, end: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A process that has made a batch, and its workers."""
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(folder / "script.py"), str(corpus), str(folder / "run"), end]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    return process, pids


@pytest.mark.parametrize("end", ["close", "forget"])
def test_a_script_with_workers_ends_well(corpus: Path, tmp_path: Path, end: str) -> None:
    """A thread that still attended to a worker would abort the interpreter on its way out."""
    process, pids = run(corpus, tmp_path, end)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0 and not any(is_running(pid) for pid in pids)


def test_workers_do_not_end_with_a_signal_to_the_whole_group(corpus: Path, tmp_path: Path) -> None:
    """SLURM and Ctrl-C reach them too, and the main process needs them until its step is saved."""
    process, pids = run(corpus, tmp_path, "never")
    found = [Path(f"/proc/{pid}/status").read_text() for pid in pids]
    process.kill()
    process.communicate()
    for status in found:
        blocked = int(re.findall(r"SigBlk:\t(\w+)", status)[0], 16)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            assert blocked >> (number - 1) & 1, number


@pytest.mark.parametrize("stopped", [False, True])
def test_workers_end_with_a_killed_parent(corpus: Path, tmp_path: Path, stopped: bool) -> None:
    parent, pids = run(corpus, tmp_path, "never")
    if stopped:
        os.kill(pids[0], signal.SIGSTOP)
    parent.kill()
    parent.wait()
    if stopped:
        os.kill(pids[0], signal.SIGCONT)
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.05)
    parent.communicate()


def is_running(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize("count", [0, 1])
def test_a_record_damaged_during_training_is_named(corpus: Path, tmp_path: Path, count: int) -> None:
    with opened(corpus, tmp_path / "run", workers=count) as pipeline:
        (file,) = (tmp_path / "cache").rglob("*-train.array_record*")
        data = bytearray(file.read_bytes())
        data[4096:4352] = bytes(256)
        file.write_bytes(data)
        named = rf"prepared in {re.escape(str(file.parent))} is damaged \({file.name}: .*\); remove that folder"
        with pytest.raises(BatchError, match=named):
            read(pipeline, 2000)
