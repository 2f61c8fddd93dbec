"""Reading a checkpoint: what is in it, whether it is what was saved, and which one of a folder is whole.

Nothing here writes, so that a folder of another run is left as it is.
"""

import functools
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from jaxllm.data import first_line
from jaxllm.data.records import refused
from jaxllm.host import processes
from jaxllm.training.fingerprint import named_fingerprints, path_name
from jaxllm.training.precision import LossScaleState

_log = logging.getLogger(__name__)

T = TypeVar("T")

# Items of a checkpoint, each a folder in it; in the first, keys of the parameters and of their average (EMA).
STATE, DATA, PARAMS, AVERAGE = "state", "data", "params", "average_of_params"
# Keys of the second item: position, fingerprints of the state by leaf, and checksum of the position.
_POSITION, LEAVES, _CHECKSUM = "position", "fingerprints", "checksum"
_RECORD = {_POSITION, LEAVES, _CHECKSUM}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says which and why."""


class Damaged(Exception):
    """A checkpoint holds other values than were saved."""


class Restored(NamedTuple):
    """Contents of a checkpoint, or the state that a new run starts from."""

    step: int  # optimizer steps done
    state: Any  # train state, placed like the abstract state
    data: Any = None  # position in the data, a dictionary; None for a new run, which reads from the beginning
    skipped: tuple[int, ...] = ()  # steps of newer checkpoints that were damaged
    branched: bool = False  # whether it is a checkpoint of `training.branch_from`


def restore_newest(folder: Path, steps: Sequence[int], abstract_state: Any) -> tuple[Restored | None, list[int]]:
    """The newest of `steps` (oldest first) that is whole, and the newer ones that are not.

    Raises:
        CheckpointError: when one does not fit `abstract_state`, or may not be read.
    """
    found, damaged = newest_whole(folder, steps, lambda step: _read(folder, step, abstract_state))
    if found is None:
        return None, damaged
    step, state, record = found
    if _RECORD & record.keys():
        return Restored(step, state, record[_POSITION], tuple(damaged)), damaged
    _log.warning("checkpoint %d in %s has no fingerprint, so it cannot be verified", step, folder)
    return Restored(step, state, record, tuple(damaged)), damaged  # the record is the position alone


def _read(folder: Path, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
    """State and record of a checkpoint, not verified; the record of an earlier version is the position alone."""
    place = folder.absolute() / str(step)
    found = ocp.StandardCheckpointHandler().metadata(epath.Path(place / STATE)).tree
    record = restored(ocp.JsonCheckpointHandler(), place / DATA, ocp.args.JsonRestore())
    _check_form(folder, step, found, abstract_state, saved=record.get(LEAVES, ()))
    state = ocp.args.StandardRestore(with_dropped_leaf(abstract_state, found))
    return without_dropped_leaf(restored(ocp.StandardCheckpointHandler(), place / STATE, state)), record


def _check_form(folder: Path, step: int, found: Any, abstract_state: Any, *, saved: Collection[str]) -> None:
    """Refuses a checkpoint of another optimizer, or of other shapes or dtypes, which orbax would silently cast."""
    if set(found) == {PARAMS}:  # of `save_params`
        raise CheckpointError(
            f"checkpoint {step} in {folder} holds parameters alone; choose another training.run_dir, with "
            f"training.init_from={folder.parent}"
        )
    have = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found)}
    wanted = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_state)}
    rules = [{name for name in names if name.startswith("opt_state/")} for names in (have, saved, wanted)]
    of_rule = {name for name in rules[0] ^ rules[2] if not name.endswith(f"/{_DROPPED}")}
    if of_rule and saved and rules[0] == rules[1]:  # else it is damage
        raise CheckpointError(
            f"checkpoint {step} in {folder} holds the state of another optimizer ({min(of_rule)} is in one alone); "
            f"continue with that one, or choose another training.run_dir with training.init_from={folder.parent}, "
            "which takes the parameters alone"
        )
    for name, want in wanted.items():
        leaf = have.get(name)
        if leaf is None or not hasattr(leaf, "dtype") or jnp.issubdtype(want.dtype, jax.dtypes.prng_key):
            continue
        if leaf.dtype != want.dtype or tuple(leaf.shape) != tuple(want.shape):
            raise CheckpointError(
                f"checkpoint {step} in {folder} holds {name} as {leaf.dtype}{list(leaf.shape)}, "
                f"this run needs {want.dtype}{list(want.shape)}"
            )


def restored(handler: Any, path: Path, arguments: Any) -> Any:
    """An item of a checkpoint, read without waiting for other processes, one of which may fail."""
    alone = ocp.options.MultiprocessingOptions(processes.index(), {processes.index()})
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
        return reader.restore(path.absolute(), args=arguments)


def record_of(position: Mapping[str, Any], tree: Any) -> dict[str, Any]:
    """The second item of a checkpoint."""
    return {_POSITION: position, LEAVES: named_fingerprints(tree), _CHECKSUM: _checksum(position)}


def verify_tree(restored: Any, record: Mapping[str, Any]) -> bool:
    """Compares a restored tree, which may be a part of what was saved, with the second item of its checkpoint.

    Returns False for a checkpoint of an earlier version, which has nothing to compare with.

    Raises:
        Damaged: naming the first leaf that differs.
    """
    found = named_fingerprints(restored)  # first: all processes compute them together, whatever one has read
    if not _RECORD & record.keys():
        return False
    if record.keys() != _RECORD or record[_CHECKSUM] != _checksum(record[_POSITION]):
        raise Damaged("the position in the data is not the one that was saved")
    for path, digits in found.items():
        if record[LEAVES].get(path) != digits:
            raise Damaged(f"{path} has fingerprint {digits}, {record[LEAVES].get(path)} was saved")
    return True


def _checksum(position: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(position, sort_keys=True).encode()).hexdigest()[:16]


def newest_whole(
    folder: Path, steps: Sequence[int], read: Callable[[int], tuple[Any, dict[str, Any]]]
) -> tuple[tuple[int, Any, dict[str, Any]] | None, list[int]]:
    """The newest of `steps` (oldest first) that is whole, with its tree and record, and the newer ones that are not.

    `read` does not wait for other processes. What one of them cannot read is damaged for all. What all have read is
    verified together, and damaged for all where one has read something else.
    """
    processes.check_same("list of checkpoints", str(list(steps)))
    damaged: list[int] = []
    for step in reversed(steps):
        found, problem = attempt(folder / str(step), read, step)
        problem = next(filter(None, processes.gather(problem)), "")
        if found and not problem:
            _, problem = attempt(folder / str(step), verify_tree, *found)
            problem = next(filter(None, processes.gather(problem)), "")
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
    hide_unfinished_reads()
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


@functools.cache
def hide_unfinished_reads() -> None:
    """Keeps the interpreter from printing a traceback for each read that is not done when another leaf has failed.

    orbax closes its event loop then. What is left of the reads fails outside of any call, when tensorstore's threads
    report to the loop or a coroutine is freed, and `attempt` reports the damage.
    Seen: orbax 0.12.8. Shown by: tests/storage/test_damage.py, `test_damage_of_all_leaves_prints_no_traceback`.
    """
    others = sys.unraisablehook

    def hook(found: Any) -> None:
        trace: TracebackType | None = found.exc_traceback
        reported = trace is not None and trace.tb_frame.f_code.co_name == "call_soon_threadsafe"
        freed = getattr(found.object, "__qualname__", "").startswith("_read_")
        if not reported and not freed:
            others(found)

    sys.unraisablehook = hook


# Until 2026-11-27 a loss scale counted recomputed batches in this leaf, which no later step reads. orbax restores only
# a tree with the leaves of the checkpoint, so the leaf is restored and dropped. What follows can go when float16 runs
# of that time no longer have to resume (tests/golden/run_folders holds two).
_DROPPED = "retried"


def with_dropped_leaf(state: Any, found: Any) -> Any:
    """The abstract state with the leaf, if the tree `found` in a checkpoint has it."""
    names = {str(getattr(path[-1], "key", "")) for path, _ in jax.tree_util.tree_leaves_with_path(found)}
    if _DROPPED not in names:
        return state
    return _map_nodes(
        lambda node: {**node._asdict(), _DROPPED: node.skipped}, state, lambda node: isinstance(node, LossScaleState)
    )


def without_dropped_leaf(state: Any) -> Any:
    """The restored state as a step takes it, whether `with_dropped_leaf` changed it or not."""
    names = {*LossScaleState._fields, _DROPPED}
    return _map_nodes(
        lambda node: LossScaleState(**{name: node[name] for name in LossScaleState._fields}),
        state,
        lambda node: isinstance(node, dict) and node.keys() == names,
    )


def _map_nodes(function: Callable[[Any], Any], tree: Any, chosen: Callable[[Any], bool]) -> Any:
    return jax.tree.map(lambda node: function(node) if chosen(node) else node, tree, is_leaf=chosen)
