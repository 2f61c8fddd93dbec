"""Starts scripts/pretrain.py in several real processes on this machine, and waits for them."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent.parent
PRETRAIN = str(ROOT / "scripts" / "pretrain.py")
OBSERVED = ("-m", "tests.host.observed")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.host.imported"])
STARTED: list[Started] = []  # processes that a test must end
USED: set[int] = set()  # by launches of this process: ports modulo 4096
PORTS = threading.Lock()  # of USED
# One thread at a time may read the status of a fork: the second would get 255. The start of a fork reads that of all.
FORKING = threading.Lock()


class Ended(NamedTuple):
    """What a process left behind."""

    status: int
    stdout: str
    stderr: str


class Started:
    """A process whose lines are read by threads, with their times, so that no pipe fills while others are read."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], *, fork: bool) -> None:
        """Starts Python with this environment alone; with `fork`, as a fork of a process that has imported jaxllm."""
        pipes = [multiprocessing.Pipe(duplex=False) for _ in range(2)]
        stdout, stderr = (writer for _, writer in pipes)
        self._process: subprocess.Popen[bytes] | ForkServerProcess
        if fork:
            self._process = FORKS.Process(target=run_in_fork, args=(command, environment, stdout, stderr))
            with FORKING:
                self._process.start()
        else:
            command = [sys.executable, *command]
            self._process = subprocess.Popen(
                command, env=environment, cwd=ROOT, stdout=stdout.fileno(), stderr=stderr.fileno()
            )
        self.heard: list[list[tuple[float, str]]] = [[], []]
        self._threads = []
        for (reader, writer), lines in zip(pipes, self.heard, strict=True):
            writer.close()
            self._threads.append(threading.Thread(target=_read, args=(reader, lines), daemon=True))
            self._threads[-1].start()

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    def poll(self) -> int | None:
        """The status, or the negative number of a signal; None while it runs."""
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll()
        with FORKING:
            return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and its status comes later
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def end(self, timeout: float = 300) -> Ended:
        """Waits for its end; after `timeout` seconds it is killed, and the error shows its output."""
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"process {self.pid} did not end in {timeout} s: {self.heard}")
            time.sleep(0.01)
        for thread in self._threads:
            thread.join()
        return Ended(status, *("".join(line for _, line in lines) for lines in self.heard))


def _read(reader: Connection, lines: list[tuple[float, str]]) -> None:
    with reader, open(reader.fileno(), closefd=False) as stream:
        lines.extend((time.monotonic(), line) for line in stream)


def run_in_fork(command: Sequence[str], environment: dict[str, str], stdout: Connection, stderr: Connection) -> None:
    """Runs a script, or `-m` a module, as Python does in a process of its own."""
    os.environ.clear()
    os.environ.update(environment, GLIBC_TUNABLES="")  # set, so that the script does not restart itself
    os.chdir(ROOT)
    for number, writer in enumerate((stdout, stderr), start=1):
        os.dup2(writer.fileno(), number)
    if command[0] == "-m":
        sys.argv = list(command[1:])
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command)
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")


def by_hand(count: int, port: int) -> dict[str, str]:
    return {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAXLLM_PROCESSES": str(count)}


def free_port() -> int:
    """A port that no launch of this process has had; SLURM's runs take one that follows from the number modulo 4096."""
    while True:
        with PORTS, socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if port % 4096 not in USED:
            USED.add(port % 4096)
            return port


def launch(
    config: Path,
    *overrides: str,
    count: int,
    devices: int,
    program: Sequence[str] = (PRETRAIN,),
    slurm: bool = False,
    fork: bool = False,
    own: Mapping[int, Sequence[str]] | None = None,
    environments: Mapping[int, Mapping[str, str]] | None = None,
    damage: dict[str, str] | None = None,
) -> list[Started]:
    """Starts processes by three variables or SLURM's; `damage` is for the last.

    `own` has overrides, and `environments` more variables, by process. `fork` is for a quick start, see `Started`.
    """
    port = free_port()
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    common = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "COLUMNS": "300"}
    started = []
    for index in range(count):
        given = by_hand(count, port) | {"JAXLLM_PROCESS_ID": str(index)} if count > 1 else {}
        if slurm:
            given = {"SLURM_JOB_ID": str(port), "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": str(count)}
            given["SLURM_GPUS_ON_NODE"] = "8"  # which a run on its CPUs does not need
            given |= {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index), "SLURM_STEP_NUM_NODES": "1"}
        given |= (environments or {}).get(index, {})
        if damage and index == count - 1:
            given["OBSERVED_DAMAGE"] = json.dumps(damage)
        command = [*program, str(config), *overrides, *(own or {}).get(index, ())]
        started.append(Started(command, common | given, fork=fork))
        STARTED.append(started[-1])
    return started


def finish(processes: list[Started], timeout: float = 300) -> list[Ended]:
    """Waits for the end of all."""
    return [process.end(timeout) for process in processes]


def train(folder: Path, name: str, family: str, commands: Sequence[Sequence[str]], **options: Any) -> None:
    """Trains runs of folder/FAMILY.yaml in turn, by the same processes; for the commands see `observed`.

    folder/NAME-FAMILY.json records how the processes ended.
    """
    words = [word for command in commands for word in ("then", *command)][1:]
    started = launch(folder / f"{family}.yaml", *words, program=OBSERVED, fork=True, **options)
    try:
        ended = finish(started)
    finally:
        for process in started:
            process.kill()
    assert {each.status for each in ended} == {0}, ended
    (folder / f"{name}-{family}.json").write_text(json.dumps(ended))


def ended_of(folder: Path, name: str, family: str) -> list[Ended]:
    """How the processes of `train` ended."""
    return [Ended(*each) for each in json.loads((folder / f"{name}-{family}.json").read_text())]


def heard_at(processes: list[Started], message: str) -> list[float]:
    """Times at which processes printed a line that contains the message."""
    lines = [each for process in processes for lines in process.heard for each in lines]
    return [moment for moment, line in lines if message in line]


def wait_for(condition: Callable[[], bool], processes: list[Started], seconds: float = 120) -> None:
    """Waits until the condition holds; fails after `seconds`, or when a process ends before that."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
            for process in processes:
                process.kill()
            raise AssertionError(finish(processes))
        time.sleep(0.05)


def has_handler(process: Started) -> bool:
    """Whether jax has connected a process, which handles SIGTERM from then on."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (signal.SIGTERM - 1) & 1)
