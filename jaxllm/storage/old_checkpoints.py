"""Checkpoints of earlier versions, whose state has a leaf that today's state lacks.

Until 2026-11-27 a loss scale counted recomputed batches in a leaf `retried`, which no later step reads. orbax restores
only a tree with the leaves of the checkpoint, so the leaf is restored and dropped. Delete this module and its use in
`storage.checkpoint` when float16 runs of that time no longer have to resume (tests/golden/run_folders holds two).
"""

from typing import Any

import jax

from jaxllm.training.precision import LossScaleState

_DROPPED = "retried"


def with_dropped_leaf(state: Any, found: Any) -> Any:
    """The abstract state with the leaf, if the tree `found` in a checkpoint has it."""
    names = {str(getattr(path[-1], "key", "")) for path, _ in jax.tree_util.tree_leaves_with_path(found)}
    if _DROPPED not in names:
        return state

    def earlier(node: Any) -> Any:
        return {**node._asdict(), _DROPPED: node.skipped} if _is_today(node) else node

    return jax.tree.map(earlier, state, is_leaf=_is_today)


def without_dropped_leaf(state: Any) -> Any:
    """The restored state as a step takes it, whether `with_dropped_leaf` changed it or not."""

    def today(node: Any) -> Any:
        return LossScaleState(**{name: node[name] for name in LossScaleState._fields}) if _is_earlier(node) else node

    return jax.tree.map(today, state, is_leaf=_is_earlier)


def _is_today(node: Any) -> bool:
    return isinstance(node, LossScaleState)


def _is_earlier(node: Any) -> bool:
    return isinstance(node, dict) and node.keys() == {*LossScaleState._fields, _DROPPED}
