"""Checkpoints: everything that orbax does for a run, and for parameters alone.

A checkpoint is atomic (written next to and renamed), written in the background, and holds the train state, the data
iterator's state and a small record. The newest `keep` stay, and the best by validation loss. What orbax would
silently cast or leave half restored is compared here. Reading takes the newest whole checkpoint. Restoring a run also
sets newer, damaged ones aside: a disk that fails for a moment must cost no checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxllm.data import first_line
from jaxllm.run.old_checkpoints import with_dropped_leaf, without_dropped_leaf

_log = logging.getLogger(__name__)

T = TypeVar("T")

# Items of a checkpoint, each a folder in it, and the key of the parameters in the first.
_STATE, _DATA, _PARAMS = "state", "data", "params"
# The key of the custom metadata that lets another process find the best checkpoint.
_LOSS = "validation_loss"
# orbax and tensorstore raise these for missing, truncated or garbled files.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says which and why."""


class Restored(NamedTuple):
    """Contents of a checkpoint.

    Attributes:
        step: optimizer steps done.
        state: train state, placed as the abstract state asked.
        data: state of the data iterator.
        skipped: steps of newer checkpoints that were damaged.
    """

    step: int
    state: Any
    data: dict[str, Any]
    skipped: tuple[int, ...]


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


class Checkpoints:
    """The checkpoint folder of one run."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        """Opens or creates the folder and removes what an interrupted save left behind."""
        self._losses: dict[int, float] = {}
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_NewestAndBest(keep, self._losses),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        try:
            # Named here, so that a new process can read what a checkpoint holds before restoring it.
            handlers = {_STATE: ocp.StandardCheckpointHandler(), _DATA: ocp.JsonCheckpointHandler()}
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handlers)
        except OSError as error:
            raise CheckpointError(f"cannot use checkpoint folder {folder}: {error}") from error
        self.folder = folder
        for step in self.steps():
            with contextlib.suppress(*_UNREADABLE):  # `restore` says so, if it is asked for this one
                self._note_loss(step, (self._manager.metadata(step).custom_metadata or {}).get(_LOSS))

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, data: dict[str, Any], *, validation_loss: float | None) -> None:
        """Starts writing a checkpoint; an error of the previous one surfaces here."""
        self._note_loss(step, validation_loss)
        items = ocp.args.Composite(**{_STATE: ocp.args.StandardSave(state), _DATA: ocp.args.JsonSave(data)})
        try:
            self._manager.save(step, args=items, custom_metadata={_LOSS: validation_loss}, force=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot save step {step} in {self.folder}: {error}") from error

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"a checkpoint in {self.folder} could not be written: {error}") from error

    def restore(self, abstract_state: Any) -> Restored | None:
        """The newest whole checkpoint, or None when there is none yet; newer ones are moved aside.

        Raises:
            CheckpointError: when checkpoints exist and all are damaged, one does not fit `abstract_state`, or a damaged
                one cannot be moved.
        """
        found, damaged = _newest_whole(self.folder, self.steps(), lambda step: self._read(step, abstract_state))
        if found is not None:
            self._set_aside(damaged)
            step, (state, data) = found
            return Restored(step, state, data, tuple(damaged))
        if damaged:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be read (tried steps {damaged}); "
                f"restore the folder from a backup or start again in another run_dir"
            )
        return None

    def _note_loss(self, step: int, loss: Any) -> None:
        self._losses.pop(step, None)
        if isinstance(loss, float) and math.isfinite(loss):
            self._losses[step] = loss

    def _set_aside(self, steps: list[int]) -> None:
        """Moves checkpoints to FOLDER.damaged/STEP (then STEP-1 and so on), so that their steps can be saved again."""
        aside = self.folder.with_name(f"{self.folder.name}.damaged")
        for step in steps:
            names = (f"{step}-{n}" if n else str(step) for n in itertools.count())
            target = next(aside / name for name in names if not (aside / name).exists())
            try:
                aside.mkdir(exist_ok=True)
                (self.folder / str(step)).rename(target)
            except OSError as error:
                raise CheckpointError(f"cannot move damaged checkpoint {step} to {target}: {error}") from error
            _log.warning("checkpoint %d is now %s", step, target)
        if steps:
            self._manager.reload()

    def close(self) -> None:
        """Waits for saves and releases the folder."""
        self.wait()
        self._manager.close()

    def _read(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        found = self._manager.item_metadata(step)[_STATE]
        self._check_dtypes(step, found, abstract_state)
        state = ocp.args.StandardRestore(with_dropped_leaf(abstract_state, found))
        wanted = ocp.args.Composite(**{_STATE: state, _DATA: ocp.args.JsonRestore()})
        restored = self._manager.restore(step, args=wanted)
        return without_dropped_leaf(restored[_STATE]), restored[_DATA]

    def _check_dtypes(self, step: int, found: Any, abstract_state: Any) -> None:
        """Refuses a checkpoint of other shapes or dtypes, which orbax would silently cast."""
        if found is None:
            raise FileNotFoundError("its description is missing")
        if set(found) == {_PARAMS}:  # of `save_params`
            raise CheckpointError(
                f"checkpoint {step} in {self.folder} holds parameters alone; choose another training.run_dir, with "
                f"training.init_from={self.folder.parent}"
            )
        have = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found)}
        for path, want in jax.tree_util.tree_leaves_with_path(abstract_state):
            leaf = have.get(_name(path))
            if leaf is None or not hasattr(leaf, "dtype") or jnp.issubdtype(want.dtype, jax.dtypes.prng_key):
                continue
            if leaf.dtype != want.dtype or tuple(leaf.shape) != tuple(want.shape):
                raise CheckpointError(
                    f"checkpoint {step} in {self.folder} holds {_name(path)} as {leaf.dtype}{list(leaf.shape)}, "
                    f"this run needs {want.dtype}{list(want.shape)}"
                )


def save_params(folder: Path, params: Any) -> None:
    """Writes parameters alone as the checkpoint of step 0: a start for other runs, which no run resumes."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        writer.save((folder / "0" / _STATE).absolute(), args=ocp.args.PyTreeSave({_PARAMS: params}))


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
            return jax.device_put(reader.restore(folder / str(step) / _STATE, args=options)[_PARAMS])

    steps = sorted(int(item.name) for item in folder.glob("*") if item.name.isdigit())
    found, damaged = _newest_whole(folder, steps, read)
    if found is not None:
        return found[1]
    if damaged:
        raise CheckpointError(f"no readable checkpoint in {folder} (tried steps {damaged})")
    raise CheckpointError(f"no checkpoint in {folder} yet; train the run until its first (training.save_every)")


def _newest_whole(
    folder: Path, steps: Sequence[int], read: Callable[[int], T]
) -> tuple[tuple[int, T] | None, list[int]]:
    """The newest of `steps` (oldest first) that can be read, with its contents, and the newer ones that cannot."""
    damaged: list[int] = []
    for step in reversed(steps):
        try:
            return (step, read(step)), damaged
        except _UNREADABLE as error:
            _log.warning("checkpoint %d in %s is damaged (%s)", step, folder, first_line(error))
            damaged.append(step)
    return None, damaged


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)
