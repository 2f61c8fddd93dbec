"""Checkpoints of a run: orbax behind the four things a trainer needs.

A checkpoint is atomic (written next to and renamed), written in the background, and holds the train state, the data
iterator's state and a small record. The newest `keep` stay, and the best by validation loss. What orbax would
silently cast or leave half restored is compared here. Restoring skips a damaged checkpoint for the newest whole one,
and sets it aside: a disk that fails for a moment must cost no checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxllm.data import first_line
from jaxllm.run.old_checkpoints import with_dropped_leaf, without_dropped_leaf

_log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says which and why."""


class Restored(NamedTuple):
    """What a checkpoint held.

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


# Where a checkpoint's own description says how good it is, so that another process knows the best one, too.
_LOSS = "validation_loss"


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
            handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handlers)
        except OSError as error:
            raise CheckpointError(f"cannot use checkpoint folder {folder}: {error}") from error
        self.folder = folder
        for step in self.steps():
            with contextlib.suppress(*UNREADABLE):  # `restore` says so, if it is asked for this one
                self._note_loss(step, (self._manager.metadata(step).custom_metadata or {}).get(_LOSS))

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, data: dict[str, Any], *, validation_loss: float | None) -> None:
        """Starts writing a checkpoint; an error of the previous one surfaces here."""
        self._note_loss(step, validation_loss)
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data))
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
        skipped: list[int] = []
        for step in reversed(self.steps()):
            try:
                state, data = self._read(step, abstract_state)
            except UNREADABLE as error:
                _log.warning("checkpoint %d in %s is damaged (%s)", step, self.folder, first_line(error))
                skipped.append(step)
                continue
            self._set_aside(skipped)
            return Restored(step, state, data, tuple(skipped))
        if skipped:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be read (tried steps {skipped}); "
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
        found = self._manager.item_metadata(step)["state"]
        self._check_dtypes(step, found, abstract_state)
        wanted = ocp.args.StandardRestore(with_dropped_leaf(abstract_state, found))
        restored = self._manager.restore(step, args=ocp.args.Composite(state=wanted, data=ocp.args.JsonRestore()))
        return without_dropped_leaf(restored["state"]), restored["data"]

    def _check_dtypes(self, step: int, found: Any, abstract_state: Any) -> None:
        """Refuses a checkpoint of other shapes or dtypes, which orbax would silently cast."""
        if found is None:
            raise FileNotFoundError("its description is missing")
        if set(found) == {"params"}:
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


# orbax and tensorstore raise these for missing, truncated or garbled files.
UNREADABLE = (OSError, ValueError, KeyError, TypeError)


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)
