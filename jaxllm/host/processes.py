"""Several processes that train one run: how they start, wait for each other, compare what they have, and end.

jax.distributed connects them; all run the same program, and the first alone writes files. Their text goes through jax's
coordination service and not through devices, whose collectives give up on a process that prepares data for minutes.
In one process every function returns at once.
"""

import contextlib
import itertools
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
from jax._src.distributed import global_state  # the service has no public name (jax 0.9 to 0.12)

from jaxllm.host.device import nvidia_devices

_log = logging.getLogger(__name__)

UNFINISHED = 75  # exit status of a run that was stopped before its last step, EX_TEMPFAIL: start it again

EVERY = 8  # steps from a request of the first process until all act on it, see `agreed`

_BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAXLLM_PROCESSES", "JAXLLM_PROCESS_ID")
_LONGEST = 24 * 3600 * 1000  # milliseconds to wait for another process: the first may prepare data for hours
_FAILED = "jaxllm/failed"  # key of the exit status of the process that failed first
_calls = itertools.count()
_started = threading.Event()


def start() -> None:
    """Connects the tasks of SLURM, Open MPI or a Kubernetes Job, or processes given by three variables, if several.

    JAXLLM_PROCESSES=1 alone makes each process a run of its own. Call it before jax opens its devices.

    Raises:
        ValueError: when some of the three variables are missing, or the processes do not find each other.
    """
    address, count, number = (os.environ.get(name, "") for name in _BY_HAND)
    # What mpirun starts on another node also has the variables of the SLURM task that started it there.
    in_slurm = "SLURM_STEP_NODELIST" in os.environ and "OMPI_COMM_WORLD_SIZE" not in os.environ
    tasks = "SLURM_NTASKS" if in_slurm else "OMPI_COMM_WORLD_SIZE"
    try:
        if count == "1" and not number:
            return  # whatever the cluster says
        if count or number:
            if not (address and count and number):
                raise ValueError(f"set all of {', '.join(_BY_HAND)}, or none")
            jax.distributed.initialize(address, int(count), int(number), cluster_detection_method="deactivate")
        elif int(os.environ.get(tasks, "1")) > 1 or "JOB_COMPLETION_INDEX" in os.environ:
            jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the processes of this run cannot connect: {error}; docs/cluster.md has examples") from error
    if several():
        _started.set()
        sys.excepthook = lambda _, error, __: end_all(error)
        threading.Thread(target=_end_with_others, daemon=True).start()


def several() -> bool:
    """Whether this process is one of several."""
    return global_state.client is not None and global_state.num_processes > 1


def index() -> int:
    """The number of this process, known before jax opens its devices; 0 writes the run's files and its log."""
    return global_state.process_id


def unique_prefix() -> str:
    """A prefix of keys of the coordination service that no other call returns, the same on all processes."""
    return f"jaxllm/call{next(_calls)}/"


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order, once all have made this call; all must make the same calls."""
    if not several():
        return [text]
    call = unique_prefix()
    _client().key_value_set(f"{call}{index():09d}", text)
    _client().wait_at_barrier(call, _LONGEST)
    return [value for _, value in sorted(_client().key_value_dir_get(call))]


@contextlib.contextmanager
def first_then_all() -> Iterator[None]:
    """The first process executes the block, then the others do: what it has prepared, they find."""
    if index() > 0:
        gather("")
    yield
    if index() == 0:
        gather("")


def shares(folder: Path) -> bool:
    """Whether all processes have the same folder by this name, made where it is new; all must call this together."""
    if not several():
        return True
    mark = folder / f".shared-{gather(secrets.token_hex(8))[0]}"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)  # NFS may remember that it was not there; this asks the server
        if index() == 0:
            mark.touch()
    gather("made")
    found = gather("" if mark.exists() else "not there")
    if index() == 0:
        mark.unlink(missing_ok=True)
    return "not there" not in found


def check_same(what: str, text: str) -> None:
    """Raises ValueError unless all processes have the same text."""
    for other, theirs in enumerate(gather(text)):
        if theirs != text:
            raise ValueError(
                f"processes {other} and {index()} have a different {what}; start all with the same command and files, "
                f"in a run_dir on a file system that they share"
            )


def check_devices() -> None:
    """Raises ValueError where processes have different numbers of devices, or use only some GPUs of their machine."""
    if not several():
        return
    here = socket.gethostname()
    count = gather(here).count(here)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    given = int(os.environ.get("SLURM_GPUS_ON_NODE", len(nvidia_devices())))
    given = given if visible is None else len(visible.split(","))
    if jax.default_backend() == "gpu" and (used := count * jax.local_device_count()) < given:
        raise ValueError(
            f"{count} processes on {here} use {used} of its {given} GPUs; start one for each (SLURM: --ntasks-per-node="
            f"{given}, Open MPI: --map-by ppr:{given}:node), or set CUDA_VISIBLE_DEVICES to those that the run may use"
        )
    if len(set(sizes := gather(str(jax.local_device_count())))) > 1:
        fix = "start one for each GPU, or set CUDA_VISIBLE_DEVICES"
        raise ValueError(f"the processes have {', '.join(sizes)} devices, and all must have as many; {fix}")
    _log.info("%d processes with %d devices", jax.process_count(), jax.device_count())


def agreed(keys: str, step: int, wanted: bool) -> bool:
    """Whether the first process made a request eight steps ago; the same on all, when called in every eighth step.

    A process whose metrics are read one step late dispatches at most two steps more than the first one has, so that it
    finds the request at its step. `keys` are the caller's, of `unique_prefix`.
    """
    try:
        _client().key_value_try_get(f"{keys}{step}")
        return True
    except Exception as error:
        if "NOT_FOUND" not in str(error):
            raise
    if wanted and index() == 0:
        _client().key_value_set(f"{keys}{step + EVERY}", "", allow_overwrite=True)
    return False


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
    """Reports an error and returns the exit status; several processes end here, with the message of the first to fail.

    They end at once: on the way out, open checkpoints would wait for each other.
    """
    status = 130 if isinstance(error, KeyboardInterrupt) else status  # as a shell reports it
    if not several():
        _report(error)
        return status
    if isinstance(error, jax.errors.JaxRuntimeError):  # a device, the network or another process failed
        status = UNFINISHED
    try:
        _client().key_value_set(_FAILED, str(status))
        first = True
    except Exception as refusal:  # of jaxlib: there is a value, or the service has ended with the first process
        first = "ALREADY_EXISTS" not in str(refusal)
    if first:
        _report(error)
    else:
        with contextlib.suppress(Exception):  # all end with the status of the first
            status = int(_client().key_value_try_get(_FAILED))
    _end(status)


def leave(status: int) -> int:
    """The exit status of a run without errors; several processes wait for each other and end here."""
    if several():
        gather("")
        jax.distributed.shutdown()
        _exit(status)
    return status


def _client() -> Any:
    return global_state.client


def _report(error: BaseException) -> None:
    if isinstance(error, jax.errors.JaxRuntimeError):
        text = "another process has ended, or a device or the network failed; the same command resumes: %s"
        _log.error(text, str(error).splitlines()[0])
    elif isinstance(error, ValueError | OSError) or type(error).__module__.startswith("jaxllm"):
        _log.error("%s", error)
    elif not isinstance(error, KeyboardInterrupt):
        _log.error("this process failed", exc_info=error)


def _end(status: int) -> NoReturn:
    # The service must outlive the other processes, which would be aborted with a message of their own.
    time.sleep(2 if index() > 0 else 3)
    _exit(status)


def _exit(status: int) -> NoReturn:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # at once: srun --kill-on-bad-exit would kill those that take longer


def _end_with_others() -> None:
    while True:
        time.sleep(0.5)
        try:
            status = _client().key_value_try_get(_FAILED)
        except Exception as error:
            if "NOT_FOUND" in str(error):
                continue
            return  # the service has ended, and with it this process
        _end(int(status))
