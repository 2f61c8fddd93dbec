"""Checkpoints: everything that orbax does for a run, and for parameters alone.

A checkpoint is atomic (written under a temporary name, then renamed), is written in the background, and holds the train
state, the position in the data, and fingerprints of both. The newest `keep` stay, and the best by validation loss.
orbax's files have no checksum of arrays, so what was restored is compared with the fingerprints of what was to be
saved: a difference is damage, as is any failure to read. Reading takes the newest whole checkpoint. Restoring a run
also sets newer, damaged ones aside: a disk that fails for a moment must cost no checkpoint.
"""

import contextlib
import errno
import functools
import itertools
import logging
import math
import operator
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from jaxllm.data import first_line
from jaxllm.data.durable import move, sync_tree
from jaxllm.host import processes
from jaxllm.storage import checkpoint_reading as reading
from jaxllm.storage.checkpoint_reading import AVERAGE, DATA, LEAVES, PARAMS, STATE, CheckpointError, Restored
from jaxllm.storage.folder import checkpoint_steps
from jaxllm.training.fingerprint import total
from jaxllm.training.sharding import make_mesh, with_shardings

_log = logging.getLogger(__name__)

# Keys of the custom metadata that let another process find the best checkpoint: the losses by step, of those on disk
# when it was saved. Earlier versions evaluated before they saved, and wrote the checkpoint's own loss.
_LOSSES, _LOSS = "validation_losses", "validation_loss"
_TRIES = 3  # saves in a row


class _SharedManager(ocp.CheckpointManager):
    """The manager of several processes; orbax calls these methods, also in threads."""

    def reached_preemption(self, step: int) -> bool:
        """Always False, because orbax would call jax's sync point with other step numbers than `stop_signals`."""
        del step
        return False

    def _wait_for_checkpointers(self) -> None:
        """Ends all processes when one cannot write, since what follows would wait for it."""
        try:
            super()._wait_for_checkpointers()
        except (OSError, ValueError) as error:
            with processes.together():
                raise CheckpointError(f"cannot write a checkpoint: {first_line(error)}") from error


class NewestAndBest(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the newest `keep` checkpoints and the one of the lowest loss."""

    def __init__(self, keep: int, losses: Mapping[int, float]) -> None:
        self._keep, self._losses = keep, losses

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Which of the checkpoints, oldest first, stay."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = min((step for step in steps if step in self._losses), key=self._losses.__getitem__, default=None)
        return [step == best or step in steps[-self._keep :] for step in steps]


class Durable(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A checkpoint, or an item of one, until it has its name."""

    async def finalize(self) -> None:
        """Renames a checkpoint once its files are on disk; older ones are deleted once its name is on disk."""
        if ocp.path.atomicity.TMP_DIR_SUFFIX in self.get_final().parent.name:  # an item: synced with its checkpoint
            return await super().finalize()
        sync_tree(Path(self.get()))
        await super().finalize()
        sync_tree(Path(self.get_final()))  # again: orbax writes small files just before it renames


class Checkpoints:
    """The checkpoint folder of one run."""

    def __init__(self, folder: Path, *, keep: int, minutes: float | None = None) -> None:
        """Opens or creates the folder and removes what an interrupted save left behind; for `minutes` see `late`."""
        reading.hide_unfinished_reads()
        self._minutes, self._saved = minutes, time.monotonic()
        self._requests = processes.unique_prefix()
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
            async_options=ocp.options.AsyncOptions(timeout_secs=24 * 3600),  # orbax's 20 minutes end slow saves
            temporary_path_class=Durable,
        )
        try:
            # Named here, so that a new process can read what a checkpoint holds before restoring it.
            handlers = {STATE: ocp.StandardCheckpointHandler(), DATA: ocp.JsonCheckpointHandler()}
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
                about = self._manager.metadata(step).custom_metadata or {}
                for at, loss in about.get(_LOSSES, {step: about.get(_LOSS)}).items():
                    self.evaluated(int(at), loss)

    def steps(self) -> list[int]:
        """Steps whose checkpoint is on disk or being written, oldest first."""
        return sorted(self._manager.all_steps())

    def evaluated(self, step: int, loss: Any) -> None:
        """Takes the validation loss of a step, by which the best checkpoint stays: a number, or None without one."""
        self._losses.pop(step, None)
        if isinstance(loss, float) and math.isfinite(loss):
            self._losses[step] = loss

    def late(self, step: int) -> bool:
        """Whether `minutes` have passed since the last save; several processes go by the clock of the first."""
        late = self._minutes is not None and time.monotonic() - self._saved >= 60 * self._minutes
        if self._minutes is None or not processes.several():
            return late
        return step % processes.EVERY == 0 and processes.agreed(self._requests, step, late)

    def save(self, step: int, state: Any, data: dict[str, Any], note: Callable[[str], object] = lambda _: None) -> None:
        """Calls `note` with the fingerprint, then starts to write; a failure, at once or later, is reported once."""
        self.wait()
        self._saved = time.monotonic()
        if self._failures:
            self._remove_unfinished()
        record = reading.record_of(data, state)  # before the save, which may read buffers that change
        note(total(record[LEAVES]))
        items = ocp.args.Composite(**{STATE: ocp.args.StandardSave(state), DATA: ocp.args.JsonSave(record)})
        try:
            losses = {str(at): self._losses[at] for at in (*self.steps(), step) if at in self._losses}
            self._manager.save(step, args=items, custom_metadata={_LOSSES: losses}, force=True)
            self._writing = step
        except Exception as error:  # tensorstore's is a ValueError for a full disk
            self._failed(step, error)

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
        found, damaged = reading.restore_newest(self.folder, self.steps(), abstract_state)
        if found is not None:
            if damaged:
                if processes.index() == 0:
                    _move_aside(self.folder, damaged)
                processes.gather("moved")
                self._manager.reload()
            for step in [step for step in self._losses if step > found.step]:  # evaluated again
                del self._losses[step]
            return found
        if damaged or self._undescribed:
            raise _none_readable(self.folder, [*damaged, *self._undescribed])
        return None

    def close(self) -> None:
        """Waits for saves and releases the folder."""
        with contextlib.suppress(CheckpointError):  # whoever needs the save has waited for it
            self.wait()
        self._manager.close()

    def _failed(self, step: int, error: Exception) -> None:
        """Reports a failed save by a warning, the third in a row by a CheckpointError."""
        if processes.several() and isinstance(error, jax.errors.JaxRuntimeError):  # another has ended, or the network
            raise error
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


def read_leaves(folder: Path, step: int, *, arrays: bool) -> tuple[dict[str, str], str]:
    """Fingerprints in a checkpoint by leaf, none in one of an earlier version, and its damage, empty without one.

    With `arrays` the state is read, and compared with them.
    """
    here, leaves = folder.absolute() / str(step), dict[str, str]()

    def read() -> None:
        if not is_described(folder, step):
            raise reading.Damaged("its description cannot be parsed")
        record = reading.restored(ocp.JsonCheckpointHandler(), here / DATA, ocp.args.JsonRestore())
        leaves.update(record.get(LEAVES, {}))
        if not arrays:
            return
        handler = ocp.StandardCheckpointHandler()
        tree = handler.metadata(epath.Path(here / STATE)).tree
        saved = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
        arguments = ocp.args.StandardRestore(with_shardings(saved, make_mesh()))
        state = reading.restored(handler, here / STATE, arguments)
        if reading.verify_tree(state, record) and len(jax.tree.leaves(state)) < len(leaves):
            raise reading.Damaged("leaves are missing")

    return leaves, reading.attempt(folder / str(step), read)[1]


def save_params(folder: Path, params: Any) -> None:
    """Writes parameters alone as the checkpoint of step 0: a start for other runs, which no run resumes."""
    step = folder.absolute() / "0"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        writer.save(step / STATE, args=ocp.args.PyTreeSave({PARAMS: params}))
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
        writer.save(step / DATA, args=ocp.args.JsonSave(reading.record_of({}, {PARAMS: params})))


def load_params(folder: Path, abstract_params: Any, step: int | None = None, *, average: bool = True) -> Any:
    """Parameters of the newest whole checkpoint in a folder, or that of a step; the folder is left as it is.

    With `average` they are the average of the parameters, where the state has one.

    Raises:
        CheckpointError: when there is none.
    """
    folder, kept = folder.absolute(), checkpoint_steps(folder)
    if step is not None and step not in kept:
        raise CheckpointError(f"{folder} keeps no checkpoint of step {step}; it keeps {', '.join(map(str, kept))}")

    def keys(record: dict[str, Any]) -> list[str]:  # of what is loaded, in the state
        names = (name.partition(f"/{AVERAGE}/") for name in record.get(LEAVES, ()) if average)
        return next(([*before.split("/"), AVERAGE] for before, found, _ in names if found), [PARAMS])

    def read(step: int) -> tuple[Any, dict[str, Any]]:
        record, place = {}, folder / str(step)
        if (place / DATA).exists():  # earlier versions wrote none for parameters alone
            record = reading.restored(ocp.JsonCheckpointHandler(), place / DATA, ocp.args.JsonRestore())
        wanted = functools.reduce(lambda tree, key: {key: tree}, reversed(keys(record)), abstract_params)
        arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
        options = ocp.args.PyTreeRestore(item=wanted, restore_args=arguments, partial_restore=True)
        found = reading.restored(ocp.PyTreeCheckpointHandler(), place / STATE, options)
        return jax.device_put(found) if jax.tree.leaves(abstract_params)[0].sharding is None else found, record

    found, damaged = reading.newest_whole(folder, kept if step is None else [step], read)
    if found is not None:
        _log.info("parameters of step %d in %s", found[0], folder.parent)
        return functools.reduce(operator.getitem, keys(found[2]), found[1])
    if damaged:
        raise CheckpointError(f"no readable checkpoint in {folder} (tried steps {damaged})")
    raise CheckpointError(f"no checkpoint in {folder} yet; train the run until its first (training.save_every)")
