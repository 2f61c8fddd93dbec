"""Several processes that train one run: how they start, wait for each other, compare what they have, and end.

jax.distributed connects them. All of them run the same program; the first alone writes files. What this module needs
goes through jax's coordination service and not through devices, whose collectives give up on a process that prepares
data for minutes. One process needs none of it: every function here then returns at once.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax._src.distributed import global_state  # the service has no public name (jax 0.9 to 0.12)

from jaxllm.run.device import nvidia_devices

_log = logging.getLogger(__name__)

UNFINISHED = 75  # exit status of a run that was stopped before its last step: EX_TEMPFAIL, start it again

_BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAXLLM_PROCESSES", "JAXLLM_PROCESS_ID")
_LONGEST = 24 * 3600 * 1000  # milliseconds to wait for another process: the first may prepare data for hours
_FAILED, _ENDED = "jaxllm/failed", "jaxllm/ended"  # who failed first; the exit status of all
_calls = itertools.count()
_started, _ending = threading.Event(), threading.Lock()


def start() -> None:
    """Connects the processes of a cluster's job, or of three variables; returns at once where there is one process.

    SLURM, Open MPI and indexed Jobs of Kubernetes are detected by jax. Call it before jax opens its devices.

    Raises:
        ValueError: when only some of the three variables are set, or the processes do not find each other.
    """
    address, count, number = (os.environ.get(name, "") for name in _BY_HAND)
    try:
        if count or number:
            if not (address and count and number):
                raise ValueError(f"set all of {', '.join(_BY_HAND)}, or none")
            jax.distributed.initialize(address, int(count), int(number), cluster_detection_method="deactivate")
        elif _in_cluster():
            jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the processes of this run cannot connect: {error}; docs/cluster.md has examples") from error
    if several():
        _started.set()
        sys.excepthook = lambda _, error, __: end_all(error)
        threading.Thread(target=_end_with_others, daemon=True).start()


def _in_cluster() -> bool:
    """Whether a launcher has started more than one task, by the variables that jax reads."""
    tasks = "SLURM_NTASKS" if "SLURM_STEP_NODELIST" in os.environ else "OMPI_COMM_WORLD_SIZE"
    return int(os.environ.get(tasks, "1")) > 1 or "JOB_COMPLETION_INDEX" in os.environ


def several() -> bool:
    """Whether this process is one of several; opens no device."""
    return global_state.client is not None and global_state.num_processes > 1


def is_first() -> bool:
    """Whether this is the process that writes the run's files and its log; opens no device."""
    return global_state.process_id == 0


def index() -> int:
    """The number of this process; opens no device."""
    return global_state.process_id


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order; every process must make the same calls. Waits for all."""
    if not several():
        return [text]
    client, call = _client(), f"jaxllm/call{next(_calls)}/"
    client.key_value_set(f"{call}{global_state.process_id:09d}", text)
    client.wait_at_barrier(call, _LONGEST)
    return [value for _, value in sorted(client.key_value_dir_get(call))]


@contextlib.contextmanager
def first_then_all() -> Iterator[None]:
    """The first process executes the block, then the others do: what it has prepared, they find."""
    if not is_first():
        gather("")
    yield
    if is_first():
        gather("")


def check_same(what: str, text: str) -> None:
    """Raises ValueError unless all processes have the same text."""
    for index, other in enumerate(gather(text)):
        if other != text:
            raise ValueError(
                f"processes {index} and {global_state.process_id} have a different {what}; start all with the same "
                f"command and files, in a run_dir on a file system that they share"
            )


def check_devices() -> None:
    """Raises ValueError where the processes of a machine use fewer devices than it has for them."""
    if not several():
        return
    here = socket.gethostname()
    count = gather(here).count(here)
    used, given = count * jax.local_device_count(), _given_devices()
    if used < given:
        raise ValueError(
            f"{count} processes on {here} use {used} of its {given} GPUs; start one for each (SLURM: --ntasks-per-node="
            f"{given}, Open MPI: --map-by ppr:{given}:node), or set CUDA_VISIBLE_DEVICES to those that the run may use"
        )


def _given_devices() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name])
    found = len(nvidia_devices()) if jax.default_backend() == "gpu" else 0
    return int(os.environ.get("SLURM_GPUS_ON_NODE", found))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Ends all processes that `start` has connected where the block fails in one."""
    try:
        yield
    except BaseException as error:
        if _started.is_set():
            end_all(error)
        raise


def end_all(error: BaseException, status: int = 1) -> int:
    """Reports an error and returns the exit status; several processes end here, with one message.

    They end at once: on the way out, open checkpoints would wait for each other.
    """
    if isinstance(error, KeyboardInterrupt):
        status = 130  # as a shell reports it
    if not several():
        _report(error)
        return status
    if _is_first_to_fail():
        _report(error)
    _end(status)
    return status


def _report(error: BaseException) -> None:
    if isinstance(error, jax.errors.JaxRuntimeError):
        text = "another process has ended, or a device or the network failed; the same command resumes: %s"
        _log.error(text, str(error).splitlines()[0])
    elif isinstance(error, ValueError | OSError) or type(error).__module__.startswith("jaxllm"):
        _log.error("%s", error)
    elif not isinstance(error, KeyboardInterrupt):
        _log.error("this process failed", exc_info=error)


def leave(status: int) -> int:
    """The exit status of a run without errors; several processes wait for each other and end here."""
    if several():
        gather("")
        _ending.acquire()
        jax.distributed.shutdown()
        _exit(status)
    return status


def _client() -> Any:
    return global_state.client


def _is_first_to_fail() -> bool:
    try:
        _client().key_value_set(_FAILED, str(global_state.process_id))
    except Exception as error:  # of jaxlib: there is a value, or the service has ended with the first process
        return "ALREADY_EXISTS" not in str(error)
    return True


def _end(status: int) -> None:
    if not _ending.acquire(blocking=False):
        time.sleep(_LONGEST)  # another thread is ending this process
    with contextlib.suppress(Exception):  # the service, or another process, may have ended
        _client().key_value_set(_ENDED, str(status), allow_overwrite=True)
        _client().wait_at_barrier(_ENDED, 5000)
    if is_first():
        time.sleep(1)  # the service must outlive the others, which would be aborted with a message of their own
    _exit(status)


def _exit(status: int) -> None:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # all at once: srun --kill-on-bad-exit would kill those that take longer


def _end_with_others() -> None:
    while True:
        time.sleep(0.5)
        try:
            status = _client().key_value_try_get(_ENDED)
        except Exception as error:
            if "NOT_FOUND" in str(error):
                continue
            return  # the service has ended, and with it this process
        _end(int(status))
