"""Tiny runs of both families, started as forks of this process or as the real command, and what they end with.

This process imports everything and opens no device, so that a fork starts in a fraction of a second.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxllm.config import RunConfig
from jaxllm.config.file import dump_config, parse_config

ROOT = Path(__file__).parent.parent.parent
TIMINGS = {"tokens_per_second", "tflops", "data_wait", "mfu", "mfu_palm", "mfu_6n"}
SAVE_EVERY = 2
_LIMIT = 240.0  # seconds of one start; a longer one is a hang


class Lane(NamedTuple):
    """A kind of run, and its end when nothing interrupts it.

    Attributes:
        name: family and log_every.
        config: of the run; its run_dir is replaced.
        folder: of the uninterrupted run.
        end: as `end_of` gives it.
        seconds: of an uninterrupted start.
    """

    name: str
    config: RunConfig
    folder: Path
    end: dict[str, Any]
    seconds: float


class Ended(NamedTuple):
    """A start that is over.

    Attributes:
        code: exit status, negative for a signal; None when it was ended as a hang.
        log: what it wrote.
    """

    code: int | None
    log: str

    @property
    def traceback(self) -> bool:
        """Whether a person would have seen one."""
        return "Traceback (most recent call last)" in self.log

    @property
    def resumed(self) -> int:
        """The step that it resumed from; 0 without one."""
        found = re.search(r"resuming .* from step (\d+)", self.log)
        return int(found[1]) if found else 0


class Start:
    """One start of a run, in a process of its own."""

    def __init__(
        self, folder: Path, config: RunConfig, *, real: bool = False, before: Callable[[], None] | None = None
    ):
        """A fork of this process that calls `before` first, or the `real` command."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        file, self._log = folder.with_suffix(".yaml"), folder.with_suffix(".log")
        file.write_text(dump_config(config), encoding="utf-8")
        arguments = [str(file), f"training.run_dir={folder}"]
        self.begin = time.perf_counter()
        with self._log.open("wb") as log:
            if real:
                command = [sys.executable, str(ROOT / "scripts" / "pretrain.py"), *arguments]
                self._process = subprocess.Popen(command, stdout=log, stderr=log)  # kept: its end would reap the child
                self.pid = self._process.pid
            else:
                self.pid = fork(lambda: _pretrain(arguments, before), log=log.fileno())

    def alive_after(self, seconds: float) -> bool:
        """Whether it still runs so many seconds after its begin."""
        while (left := self.begin + seconds - time.perf_counter()) > 0:
            if self._over():
                return False
            time.sleep(min(left, 0.005))
        return not self._over()

    def send(self, number: int) -> None:
        """Sends a signal, unless it has ended."""
        if not self._over():
            os.kill(self.pid, number)

    def wait(self) -> Ended:
        """Its end; a hang is ended."""
        hangs = self.alive_after(_LIMIT)
        if hangs:
            os.kill(self.pid, signal.SIGKILL)
        while not self._over():
            time.sleep(0.005)
        return Ended(None if hangs else os.waitstatus_to_exitcode(self._status or 0), self._text())

    _status: int | None = None

    def _over(self) -> bool:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = status if pid else None
        return self._status is not None

    def _text(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")


def fork(function: Callable[[], int], *, log: int) -> int:
    """The process id of a fork that runs a function, with its output in a file, and exits with what it returns."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = function()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def results_of(folder: Path, trials: int, trial: Callable[[int], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What a function returns for each of so many trials, in forks: one that dies or hangs is a result, too."""
    journal, done = folder / "journal.jsonl", 0
    folder.mkdir(parents=True, exist_ok=True)
    while done < trials:
        journal.write_bytes(b"")

        def work(first: int = done) -> int:
            with journal.open("a", encoding="utf-8") as file:
                for number in range(first, trials):
                    file.write(json.dumps(trial(number)) + "\n")
                    file.flush()
            return 0

        with (folder / "work.log").open("wb") as log:
            pid = fork(work, log=log.fileno())
        code = _ended(pid, journal)
        for line in journal.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)
            done += 1
        if done < trials:
            last = (folder / "work.log").read_text(errors="replace").strip().splitlines()[-1:]
            yield {"what": f"trial {done}: the process ended with {code} {last}", "outcome": "traceback"}
            done += 1


def _ended(pid: int, journal: Path) -> int:
    """The exit code of a process; one whose journal does not grow is ended."""
    size, since = -1, time.perf_counter()
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if journal.stat().st_size != size:
            size, since = journal.stat().st_size, time.perf_counter()
        if time.perf_counter() - since > _LIMIT:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _pretrain(arguments: list[str], before: Callable[[], None] | None) -> int:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    if before is not None:
        before()
    sys.argv = ["pretrain.py", *arguments]
    return importlib.import_module("pretrain").main()


def make_lane(root: Path, family: str, *, log_every: int, steps: int) -> Lane:
    """Trains a kind of run without any fault, unless a campaign before this one has left it in `root`."""
    corpus = root / "corpus"
    if not corpus.exists():
        _write_corpus(corpus)
    model = {"family": family, "vocab_size": 400, "d_model": 16, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    data = {"source": "files", "path": str(corpus), "sequence_length": 32, "validation_fraction": 0.2}
    precision: dict[str, Any] = {}
    if family == "t5":
        model |= {"num_decoder_layers": 1, "head_dim": 8}
        data["objective"] = "span_corruption"
        precision = {"compute": "float16", "loss_scale": "dynamic"}
    training = {
        "steps": steps,
        "batch_size": 4,
        "save_every": SAVE_EVERY,
        "eval_every": 7,
        "eval_batches": 1,
        "keep": 2,
    }
    training |= {"log_every": log_every, "sample_tokens": 0, "compilation_cache": str(root / "xla")}
    data["cache_dir"] = str(root / "data")
    config = parse_config({"model": model, "data": data, "precision": precision, "training": training})
    name = f"{family}-log{log_every}"
    done = root / name / "seconds"
    for i in () if done.exists() else (1, 2):  # the second start finds the compiled steps and the prepared data
        start = Start(root / name / f"whole{i}", config)
        ended = start.wait()
        if ended.code != 0:
            raise SystemExit(f"a run without any fault failed:\n{ended.log}")
        (root / name / "seconds.partial").write_text(str(time.perf_counter() - start.begin))
    if not done.exists():
        (root / name / "seconds.partial").rename(done)
    folder = root / name / "whole2"
    return Lane(name, config, folder, end_of(folder), float(done.read_text()))


def _write_corpus(folder: Path) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(60):
        lines = [f"line {j}: the cat {i} sat on mat {j % 7} and saw {rng.integers(999)} birds\n" for j in range(30)]
        (folder / f"{i:02d}.txt").write_text("".join(lines), encoding="utf-8")


def committed(folder: Path) -> int:
    """The newest checkpoint that is whole by its name; 0 without one."""
    steps = [int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit()]
    return max(steps, default=0)


def end_of(folder: Path) -> dict[str, Any]:
    """What a run ended with: step, fingerprints of all arrays, position in the data, and its record.

    Left out are timings, and fingerprints of the additional saves with which an interrupted start ends.
    """
    step = committed(folder)
    kept = json.loads((folder / "checkpoints" / str(step) / "data" / "metadata").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "fingerprint" not in row or row["step"] % SAVE_EVERY == 0 != row["step"]]
    return {"step": step, **kept, "rows": [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]}


def differences(lane: Lane, folder: Path) -> str:
    """The parts of a run's end that are not those of the uninterrupted run; empty when it is the same to the bit."""
    try:
        found = end_of(folder)
    except (OSError, ValueError) as error:
        return f"cannot be read: {error!r}"
    return ", ".join(name for name in lane.end if found.get(name) != lane.end[name])
