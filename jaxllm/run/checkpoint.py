"""Checkpoints: everything that orbax does for a run, and for parameters alone.

A checkpoint is atomic (written next to and renamed), written in the background, and holds the train state, the
position in the data, and fingerprints of both. The newest `keep` stay, and the best by validation loss. orbax's files
have no checksum of arrays, so what was restored is compared with the fingerprints of what was to be saved: a
difference is damage, as is any failure to read. Reading takes the newest whole checkpoint. Restoring a run also sets
newer, damaged ones aside: a disk that fails for a moment must cost no checkpoint.
"""

from __future__ import annotations

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
from jaxllm.data.durable import move, sync_tree
from jaxllm.data.records import refused
from jaxllm.run.folder import checkpoint_steps
from jaxllm.run.old_checkpoints import with_dropped_leaf, without_dropped_leaf
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


class _Damaged(Exception):
    """What a checkpoint holds is not what was saved."""


class Restored(NamedTuple):
    """Contents of a checkpoint.

    Attributes:
        step: optimizer steps done.
        state: train state, placed as the abstract state asked.
        data: state of the data iterator.
        skipped: steps of newer checkpoints that were damaged.
        verified: whether it has fingerprints, and they agree.
    """

    step: int
    state: Any
    data: dict[str, Any]
    skipped: tuple[int, ...]
    verified: bool


class _NewestAndBest(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the newest `keep` checkpoints and the one of the lowest loss."""

    def __init__(self, keep: int, losses: Mapping[int, float]) -> None:
        self._keep, self._losses = keep, losses

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Which of the checkpoints, oldest first, stay."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = min((step for step in steps if step in self._losses), key=self._losses.__getitem__, default=None)
        return [step == best or step in steps[-self._keep :] for step in steps]


class _Durable(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A checkpoint, or an item of one, until it has its name."""

    async def finalize(self) -> None:
        """Renames it when its files are on disk; older checkpoints are deleted when its name is, too."""
        sync_tree(Path(self.get()))
        await super().finalize()
        sync_tree(Path(self.get_final()))  # again: orbax writes small files just before it renames


class Checkpoints:
    """The checkpoint folder of one run."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        """Opens or creates the folder and removes what an interrupted save left behind."""
        self._losses: dict[int, float] = {}
        # orbax opens no folder in which a single checkpoint's description cannot be parsed.
        self._undescribed = [step for step in checkpoint_steps(folder) if not _is_described(folder, step)]
        if self._undescribed and self._undescribed == checkpoint_steps(folder):
            raise _none_readable(folder, self._undescribed)
        _move_aside(folder, self._undescribed)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_NewestAndBest(keep, self._losses),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            temporary_path_class=_Durable,
        )
        try:
            # Named here, so that a new process can read what a checkpoint holds before restoring it.
            handlers = {_STATE: ocp.StandardCheckpointHandler(), _DATA: ocp.JsonCheckpointHandler()}
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handlers)
        except OSError as error:
            raise CheckpointError(f"cannot use checkpoint folder {folder}: {error}") from error
        self.folder = folder
        self._writing: int | None = None  # the step of a save in the background, until it is known how that ended
        self._failures = 0  # in a row
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
            step, (state, data, verified) = found
            return Restored(step, state, data, tuple(damaged), verified)
        if damaged or self._undescribed:
            raise _none_readable(self.folder, [*damaged, *self._undescribed])
        return None

    def _note_loss(self, step: int, loss: Any) -> None:
        self._losses.pop(step, None)
        if isinstance(loss, float) and math.isfinite(loss):
            self._losses[step] = loss

    def _set_aside(self, steps: list[int]) -> None:
        _move_aside(self.folder, steps)
        if steps:
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
            return
        self._failures += 1
        causes = (os.strerror(code) for code in errno.errorcode)  # the system's words, in the message of a library
        cause = next((words for words in causes if words in str(error)), first_line(error))
        failure, fix = f"step {step} is not saved in {self.folder} ({cause})", "free space or repair the disk"
        if self._failures == _TRIES:
            kept = f"resumes from step {self.steps()[-1]}" if self.steps() else "begins again"
            ends = f"{failure}, and {_TRIES} saves in a row have failed; {fix}, then run the same command, which {kept}"
            raise CheckpointError(ends) from error
        _log.warning("%s; the next save tries again; %s before %d in a row have failed", failure, fix, _TRIES)

    def _remove_unfinished(self) -> None:
        """Removes what failed saves have left: it may be what fills the disk. Threads of orbax may still add to it."""
        for path in self.folder.glob(f"*{ocp.path.atomicity.TMP_DIR_SUFFIX}"):
            shutil.rmtree(path, ignore_errors=True)

    def _read(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any], bool]:
        found = self._manager.item_metadata(step)[_STATE]
        self._check_dtypes(step, found, abstract_state)
        state = ocp.args.StandardRestore(with_dropped_leaf(abstract_state, found))
        wanted = ocp.args.Composite(**{_STATE: state, _DATA: ocp.args.JsonRestore()})
        restored = self._manager.restore(step, args=wanted)
        state, record = without_dropped_leaf(restored[_STATE]), restored[_DATA]
        if _verify(state, record):
            return state, record[_POSITION], True
        _log.warning("checkpoint %d in %s has no fingerprint, so it cannot be verified", step, self.folder)
        return state, record, False  # the record is the position alone

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


def _none_readable(folder: Path, steps: list[int]) -> CheckpointError:
    return CheckpointError(
        f"no checkpoint in {folder} can be read (tried steps {steps}); restore the folder from a backup or start again "
        f"in another run_dir"
    )


def _is_described(folder: Path, step: int) -> bool:
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


def load_params(folder: Path, abstract_params: Any) -> Any:
    """Parameters of the newest whole checkpoint in a folder, which is left as it is.

    Raises:
        CheckpointError: when there is none.
    """
    folder = folder.absolute()
    wanted = {_PARAMS: abstract_params}
    arguments = ocp.checkpoint_utils.construct_restore_args(wanted)

    def read(step: int) -> Any:
        options = ocp.args.PyTreeRestore(item=wanted, restore_args=arguments, partial_restore=True)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            found = jax.device_put(reader.restore(folder / str(step) / _STATE, args=options))
        if (folder / str(step) / _DATA).exists():  # earlier versions wrote none for parameters alone
            with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
                _verify(found, reader.restore(folder / str(step) / _DATA))
        return found[_PARAMS]

    found, damaged = _newest_whole(folder, checkpoint_steps(folder), read)
    if found is not None:
        return found[1]
    if damaged:
        raise CheckpointError(f"no readable checkpoint in {folder} (tried steps {damaged})")
    raise CheckpointError(f"no checkpoint in {folder} yet; train the run until its first (training.save_every)")


def _record(position: Mapping[str, Any], tree: Any) -> dict[str, Any]:
    return {_POSITION: position, _LEAVES: named_fingerprints(tree), _CHECKSUM: _checksum(position)}


def _verify(restored: Any, record: Mapping[str, Any]) -> bool:
    """Compares a restored tree, which may be a part of what was saved, with the second item of its checkpoint.

    Returns False for a checkpoint of an earlier version, which has nothing to compare with.

    Raises:
        _Damaged: naming the first leaf that differs.
    """
    if not _RECORD & record.keys():
        return False
    if record.keys() != _RECORD or record[_CHECKSUM] != _checksum(record[_POSITION]):
        raise _Damaged("the position in the data is not the one that was saved")
    for path, digits in named_fingerprints(restored).items():
        if record[_LEAVES].get(path) != digits:
            raise _Damaged(f"{path} has fingerprint {digits}, {record[_LEAVES].get(path)} was saved")
    return True


def _checksum(position: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(position, sort_keys=True).encode()).hexdigest()[:16]


def _newest_whole(
    folder: Path, steps: Sequence[int], read: Callable[[int], T]
) -> tuple[tuple[int, T] | None, list[int]]:
    """The newest of `steps` (oldest first) that can be read, with its contents, and the newer ones that cannot.

    orbax and tensorstore raise errors of many kinds for damaged files, so that all count as damage, but for those
    that another checkpoint would meet too: memory, permissions, and shapes that do not fit.
    """
    damaged: list[int] = []
    for step in reversed(steps):
        try:
            return (step, read(step)), damaged
        except (CheckpointError, MemoryError):
            raise
        except Exception as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise
            refusal = refused(folder / str(step))
            if refusal is not None:
                raise CheckpointError(
                    f"cannot read {refusal.filename}: {refusal.strerror}; make it readable"
                ) from error
            _log.warning("checkpoint %d in %s is damaged (%s)", step, folder, first_line(error))
            damaged.append(step)
    return None, damaged
