"""Starts scripts/pretrain.py in several real processes on this machine, and waits for them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
PRETRAIN = str(ROOT / "scripts" / "pretrain.py")
OBSERVED = ("-m", "tests.host.observed")
STARTED: list[subprocess.Popen[str]] = []  # that a test must end


class Ended(NamedTuple):
    """What a process left behind."""

    status: int
    stdout: str
    stderr: str


def by_hand(count: int, port: int) -> dict[str, str]:
    return {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAXLLM_PROCESSES": str(count)}


def launch(
    config: Path,
    *overrides: str,
    count: int,
    devices: int,
    program: Sequence[str] = (PRETRAIN,),
    slurm: bool = False,
    last: Sequence[str] = (),
    damage: dict[str, str] | None = None,
) -> list[subprocess.Popen[str]]:
    """Starts processes by three variables or SLURM's; `last` are overrides, and `damage` is, of the last of them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    common = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "COLUMNS": "300"}
    started = []
    for index in range(count):
        own = by_hand(count, port) | {"JAXLLM_PROCESS_ID": str(index)}
        if slurm:
            own = {"SLURM_JOB_ID": str(port), "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": str(count)}
            own["SLURM_GPUS_ON_NODE"] = "8"  # which a run on its CPUs does not need
            own |= {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index), "SLURM_STEP_NUM_NODES": "1"}
        if damage and index == count - 1:
            own["OBSERVED_DAMAGE"] = json.dumps(damage)
        command = [sys.executable, *program, str(config), *overrides, *(last if index == count - 1 else ())]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=common | own, cwd=ROOT, **pipes))
    STARTED.extend(started)
    return started


def finish(processes: list[subprocess.Popen[str]]) -> list[Ended]:
    ended = [(process, process.communicate(timeout=300)) for process in processes]
    return [Ended(process.returncode, *output) for process, output in ended]


def wait_for(condition: Callable[[], bool], processes: list[subprocess.Popen[str]], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.05)


def has_handler(process: subprocess.Popen[str]) -> bool:
    """Whether jax has connected a process, which handles SIGTERM from then on."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (signal.SIGTERM - 1) & 1)
