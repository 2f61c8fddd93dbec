"""Checkpoints: everything that orbax does for a run, and for parameters alone.

A checkpoint is atomic (written next to and renamed), written in the background, and holds the train state, the
position in the data, and fingerprints of both. The newest `keep` stay, and the best by validation loss. orbax's files
have no checksum of arrays, so what was restored is compared with the fingerprints of what was to be saved: a
difference is damage, as is any failure to read. Reading takes the newest whole checkpoint. Restoring a run also sets
newer, damaged ones aside: a disk that fails for a moment must cost no checkpoint.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxllm.data import first_line
from jaxllm.data.durable import move
from jaxllm.data.records import refused
from jaxllm.host import processes
from jaxllm.storage.checkpoint_rules import Durable, NewestAndBest
from jaxllm.storage.folder import checkpoint_steps
from jaxllm.storage.old_checkpoints import with_dropped_leaf, without_dropped_leaf
from jaxllm.training.fingerprint import named_fingerprints, path_name, total

_log = logging.getLogger(__name__)

T = TypeVar("T")

# Items of a checkpoint, each a folder in it, and the key of the parameters in the first.
_STATE, _DATA, _PARAMS = "state", "data", "params"
# The key of the custom metadata that lets another process find the best checkpoint.
_LOSS = "validation_loss"
# Keys of the second item: position, fingerprints of the state by leaf, and checksum of the position.
_POSITION, _LEAVES, _CHECKSUM = "position", "fingerprints", "checksum"
_RECORD = {_POSITION, _LEAVES, _CHECKSUM}
_TRIES = 3  # saves in a row


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says which and why."""


class Damaged(Exception):
    """What a checkpoint holds is not what was saved."""


class Restored(NamedTuple):
    """Contents of a checkpoint."""

    step: int  # optimizer steps done
    state: Any  # train state, placed as the abstract state asked
    data: dict[str, Any]  # state of the data iterator
    skipped: tuple[int, ...]  # steps of newer checkpoints that were damaged
    verified: bool  # whether it has fingerprints, and they agree


class _SharedManager(ocp.CheckpointManager):
    """The manager of several processes; orbax calls these methods, also in threads."""

    def reached_preemption(self, step: int) -> bool:
        """Leaves jax's counter to `stop_signals`; orbax would set it to other numbers."""
        del step
        return False

    def _wait_for_checkpointers(self) -> None:
        """Ends all processes when one cannot write, since what follows would wait for it."""
        try:
            super()._wait_for_checkpointers()
        except (OSError, ValueError) as error:
            with processes.together():
                raise CheckpointError(f"cannot write a checkpoint: {first_line(error)}") from error


class Checkpoints:
    """The checkpoint folder of one run."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        """Opens or creates the folder and removes what an interrupted save left behind."""
        self._losses: dict[int, float] = {}
        with processes.first_then_all():
            # orbax opens no folder in which a single checkpoint's description cannot be parsed.
            self._undescribed = [step for step in checkpoint_steps(folder) if not is_described(folder, step)]
            if self._undescribed and self._undescribed == checkpoint_steps(folder):
                raise _none_readable(folder, self._undescribed)
            _move_aside(folder, self._undescribed)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=NewestAndBest(keep, self._losses),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            temporary_path_class=Durable,
        )
        try:
            # Named here, so that a new process can read what a checkpoint holds before restoring it.
            handlers = {_STATE: ocp.StandardCheckpointHandler(), _DATA: ocp.JsonCheckpointHandler()}
            manager = _SharedManager if processes.several() else ocp.CheckpointManager
            self._manager = manager(folder.absolute(), options=options, item_handlers=handlers)
        except OSError as error:
            raise CheckpointError(f"cannot use checkpoint folder {folder}: {error}") from error
        self.folder = folder
        self._writing: int | None = None  # the step of a save in the background, until it is known how that ended
        self._failures = 0  # in a row
        self._tries = 1 if processes.several() else _TRIES  # another process may have written its part
        for step in self.steps():
            with contextlib.suppress(Exception):  # `restore` reports it, if it comes to this one
                self._note_loss(step, (self._manager.metadata(step).custom_metadata or {}).get(_LOSS))

    def steps(self) -> list[int]:
        """Steps whose checkpoint is on disk or being written, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, data: dict[str, Any], *, validation_loss: float | None) -> str:
        """Starts writing a checkpoint; returns its fingerprint. A save that fails, then or later, is reported once."""
        self.wait()
        if self._failures:
            self._remove_unfinished()
        self._note_loss(step, validation_loss)
        record = _record(data, state)  # before the save, which may read buffers that change
        items = ocp.args.Composite(**{_STATE: ocp.args.StandardSave(state), _DATA: ocp.args.JsonSave(record)})
        try:
            self._manager.save(step, args=items, custom_metadata={_LOSS: validation_loss}, force=True)
            self._writing = step
        except Exception as error:  # tensorstore's is a ValueError for a full disk
            self._failed(step, error)
        return total(record[_LEAVES])

    def poll(self) -> None:
        """Reports a save that has failed in the background; returns at once while it is written."""
        if self._writing is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is on disk or has failed, which is reported."""
        step, self._writing = self._writing, None
        if step is None:
            return
        try:
            self._manager.wait_until_finished()
            self._failures = 0
        except Exception as error:
            self._failed(step, error)

    def restore(self, abstract_state: Any) -> Restored | None:
        """The newest whole checkpoint, or None when there is none yet; newer ones are moved aside.

        Raises:
            CheckpointError: when checkpoints exist and all are damaged, one does not fit `abstract_state`, or a damaged
                one cannot be moved.
        """
        found, damaged = _newest_whole(self.folder, self.steps(), lambda step: self._read(step, abstract_state))
        if found is not None:
            self._set_aside(damaged)
            step, state, record = found
            if _RECORD & record.keys():
                return Restored(step, state, record[_POSITION], tuple(damaged), verified=True)
            _log.warning("checkpoint %d in %s has no fingerprint, so it cannot be verified", step, self.folder)
            return Restored(step, state, record, tuple(damaged), verified=False)  # the record is the position alone
        if damaged or self._undescribed:
            raise _none_readable(self.folder, [*damaged, *self._undescribed])
        return None

    def _note_loss(self, step: int, loss: Any) -> None:
        self._losses.pop(step, None)
        if isinstance(loss, float) and math.isfinite(loss):
            self._losses[step] = loss

    def _set_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        if processes.index() == 0:
            _move_aside(self.folder, steps)
        processes.gather("moved")
        self._manager.reload()

    def close(self) -> None:
        """Waits for saves and releases the folder."""
        with contextlib.suppress(CheckpointError):  # whoever needs the save has waited for it
            self.wait()
        self._manager.close()

    def _failed(self, step: int, error: Exception) -> None:
        """Reports a failed save by a warning, the third in a row by a CheckpointError."""
        self._remove_unfinished()
        with contextlib.suppress(OSError):
            self._manager.reload()  # orbax has forgotten the checkpoints that this one would have replaced
        if step in self.steps():  # a rename can be reported as failed when it was done, as by NFS
            self._failures = 0
            return
        self._failures += 1
        causes = (os.strerror(code) for code in errno.errorcode)  # the system's words, in the message of a library
        cause = next((words for words in causes if words in str(error)), first_line(error))
        failure, fix = f"step {step} is not saved in {self.folder} ({cause})", "free space or repair the disk"
        if self._failures == self._tries:
            kept = f"resumes from step {self.steps()[-1]}" if self.steps() else "begins again"
            again = f", and {self._tries} saves in a row have failed" if self._tries > 1 else ""
            raise CheckpointError(f"{failure}{again}; {fix}, then run the same command, which {kept}") from error
        _log.warning("%s; the next save tries again; %s before %d in a row have failed", failure, fix, self._tries)

    def _remove_unfinished(self) -> None:
        """Removes what failed saves have left: it may be what fills the disk. Threads of orbax may still add to it."""
        for path in self.folder.glob(f"*{ocp.path.atomicity.TMP_DIR_SUFFIX}"):
            shutil.rmtree(path, ignore_errors=True)

    def _read(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """State and record of a checkpoint, not verified; the record of an earlier version is the position alone."""
        found = self._manager.item_metadata(step)[_STATE]
        self._check_dtypes(step, found, abstract_state)
        folder, state = self.folder / str(step), ocp.args.StandardRestore(with_dropped_leaf(abstract_state, found))
        restored = _restored(ocp.StandardCheckpointHandler(), folder / _STATE, state)
        return without_dropped_leaf(restored), _restored(
            ocp.JsonCheckpointHandler(), folder / _DATA, ocp.args.JsonRestore()
        )

    def _check_dtypes(self, step: int, found: Any, abstract_state: Any) -> None:
        """Refuses a checkpoint of other shapes or dtypes, which orbax would silently cast."""
        if found is None:
            raise FileNotFoundError("its description is missing")
        if set(found) == {_PARAMS}:  # of `save_params`
            raise CheckpointError(
                f"checkpoint {step} in {self.folder} holds parameters alone; choose another training.run_dir, with "
                f"training.init_from={self.folder.parent}"
            )
        have = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found)}
        for path, want in jax.tree_util.tree_leaves_with_path(abstract_state):
            leaf = have.get(path_name(path))
            if leaf is None or not hasattr(leaf, "dtype") or jnp.issubdtype(want.dtype, jax.dtypes.prng_key):
                continue
            if leaf.dtype != want.dtype or tuple(leaf.shape) != tuple(want.shape):
                raise CheckpointError(
                    f"checkpoint {step} in {self.folder} holds {path_name(path)} as {leaf.dtype}{list(leaf.shape)}, "
                    f"this run needs {want.dtype}{list(want.shape)}"
                )


def _restored(handler: Any, path: Path, arguments: Any) -> Any:
    """An item of a checkpoint, read without waiting for other processes, one of which may fail."""
    alone = ocp.options.MultiprocessingOptions(processes.index(), {processes.index()})
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
        return reader.restore(path.absolute(), args=arguments)


def _none_readable(folder: Path, steps: list[int]) -> CheckpointError:
    return CheckpointError(
        f"no checkpoint in {folder} can be read (tried steps {steps}); restore the folder from a backup or start again "
        f"in another run_dir"
    )


def is_described(folder: Path, step: int) -> bool:
    """Whether orbax can parse its own description of a checkpoint; one without a description is left to `restore`."""
    if not (folder / str(step) / "_CHECKPOINT_METADATA").exists():
        return True
    try:
        found = ocp.path.step.standard_name_format().find_step(folder.absolute(), step)
        return found.commit_timestamp_nsecs is not None
    except OSError:  # no damage; opening the folder reports it
        return True
    except Exception:
        return False


def _move_aside(folder: Path, steps: Sequence[int]) -> None:
    """Moves checkpoints to FOLDER.damaged/STEP (then STEP-1 and so on), so that their steps can be saved again."""
    aside = folder.with_name(f"{folder.name}.damaged")
    for step in steps:
        names = (f"{step}-{n}" if n else str(step) for n in itertools.count())
        target = next(aside / name for name in names if not (aside / name).exists())
        try:
            aside.mkdir(exist_ok=True)
            move(folder / str(step), target)
        except OSError as error:
            raise CheckpointError(f"cannot move damaged checkpoint {step} to {target}: {error}") from error
        _log.warning("checkpoint %d is now %s", step, target)


def save_params(folder: Path, params: Any) -> None:
    """Writes parameters alone as the checkpoint of step 0: a start for other runs, which no run resumes."""
    step = folder.absolute() / "0"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        writer.save(step / _STATE, args=ocp.args.PyTreeSave({_PARAMS: params}))
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
        writer.save(step / _DATA, args=ocp.args.JsonSave(_record({}, {_PARAMS: params})))


def load_params(folder: Path, abstract_params: Any, step: int | None = None) -> Any:
    """Parameters of the newest whole checkpoint in a folder, or that of a step; the folder is left as it is.

    Raises:
        CheckpointError: when there is none.
    """
    folder, kept = folder.absolute(), checkpoint_steps(folder)
    if step is not None and step not in kept:
        raise CheckpointError(f"{folder} keeps no checkpoint of step {step}; it keeps {', '.join(map(str, kept))}")
    wanted = {_PARAMS: abstract_params}
    arguments = ocp.checkpoint_utils.construct_restore_args(wanted)

    def read(step: int) -> tuple[Any, dict[str, Any]]:
        options = ocp.args.PyTreeRestore(item=wanted, restore_args=arguments, partial_restore=True)
        found = _restored(ocp.PyTreeCheckpointHandler(), folder / str(step) / _STATE, options)
        if jax.tree.leaves(abstract_params)[0].sharding is None:
            found = jax.device_put(found)
        if not (folder / str(step) / _DATA).exists():  # earlier versions wrote none for parameters alone
            return found, {}
        return found, _restored(ocp.JsonCheckpointHandler(), folder / str(step) / _DATA, ocp.args.JsonRestore())

    found, damaged = _newest_whole(folder, kept if step is None else [step], read)
    if found is not None:
        _log.info("parameters of step %d in %s", found[0], folder.parent)
        return found[1][_PARAMS]
    if damaged:
        raise CheckpointError(f"no readable checkpoint in {folder} (tried steps {damaged})")
    raise CheckpointError(f"no checkpoint in {folder} yet; train the run until its first (training.save_every)")


def _record(position: Mapping[str, Any], tree: Any) -> dict[str, Any]:
    return {_POSITION: position, _LEAVES: named_fingerprints(tree), _CHECKSUM: _checksum(position)}


def verify_tree(restored: Any, record: Mapping[str, Any]) -> bool:
    """Compares a restored tree, which may be a part of what was saved, with the second item of its checkpoint.

    Returns False for a checkpoint of an earlier version, which has nothing to compare with.

    Raises:
        Damaged: naming the first leaf that differs.
    """
    if not _RECORD & record.keys():
        return False
    if record.keys() != _RECORD or record[_CHECKSUM] != _checksum(record[_POSITION]):
        raise Damaged("the position in the data is not the one that was saved")
    for path, digits in named_fingerprints(restored).items():
        if record[_LEAVES].get(path) != digits:
            raise Damaged(f"{path} has fingerprint {digits}, {record[_LEAVES].get(path)} was saved")
    return True


def _checksum(position: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(position, sort_keys=True).encode()).hexdigest()[:16]


def _newest_whole(
    folder: Path, steps: Sequence[int], read: Callable[[int], tuple[Any, dict[str, Any]]]
) -> tuple[tuple[int, Any, dict[str, Any]] | None, list[int]]:
    """The newest of `steps` (oldest first) that is whole, with its tree and record, and the newer ones that are not.

    `read` does not wait for other processes. What one of them cannot read is damaged for all; what all have read is
    verified together.
    """
    processes.check_same("list of checkpoints", str(list(steps)))
    damaged: list[int] = []
    for step in reversed(steps):
        found, problem = attempt(folder / str(step), read, step)
        problem = next(filter(None, processes.gather(problem)), "")
        if found and not problem:
            _, problem = attempt(folder / str(step), verify_tree, *found)
        if found and not problem:
            return (step, *found), damaged
        del found  # before the next is read
        if processes.index() == 0:
            _log.warning("checkpoint %d in %s is damaged (%s)", step, folder, problem)
        damaged.append(step)
    return None, damaged


def attempt(folder: Path, function: Callable[..., T], *args: Any) -> tuple[T | None, str]:
    """The result of a function that reads a checkpoint, or why it is damaged.

    orbax and tensorstore raise errors of many kinds for damaged files, so that all count as damage, but for those
    that another checkpoint would meet too: memory, permissions, and shapes that do not fit.
    """
    try:
        return function(*args), ""
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        refusal = refused(folder)
        if refusal is not None:
            raise CheckpointError(f"cannot read {refusal.filename}: {refusal.strerror}; make it readable") from error
        return None, first_line(error) or type(error).__name__  # some begin with an empty line
