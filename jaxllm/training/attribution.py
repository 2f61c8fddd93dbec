"""Which gradient overflowed first: names of parameter groups in the order in which the backward pass reaches them.

An infinity that arises in layer k spoils the gradients of every layer below. So the first non-finite group in backward
order names the origin. Each layer of a stack is a group. Out of scope: activations (`jaxllm.jaxprs.observe`).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxllm.training.names import forward_rank, is_stacked


def gradient_groups(params: Any) -> tuple[str, ...]:
    """Names such as layers/2/down_proj/kernel, in the order of the backward pass.

    >>> params = {"embed": jnp.ones((3, 2)), "layers": {"q_proj": {"kernel": jnp.ones((2, 2, 2))}}}
    >>> gradient_groups(params)
    ('layers/1/q_proj/kernel', 'layers/0/q_proj/kernel', 'embed')
    """
    return tuple(name for name, _, _ in _groups(params))


def first_nonfinite(grads: Any) -> Int[Array, ""]:
    """Index into `gradient_groups` of the first group that holds an infinity or NaN, -1 when all are finite."""
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    flags = [finite_rows(leaf) if is_stacked(path) else all_finite(leaf)[None] for path, leaf in leaves]
    bad = ~_in_order(flags, grads)
    return jnp.where(jnp.any(bad), jnp.argmax(bad), -1).astype(jnp.int32)


def group_norms(tree: Any) -> Float[Array, " G"]:
    """Root of the sum of squares of each of the G groups of `gradient_groups`, in float32.

    >>> group_norms({"embed": jnp.full(4, 2.0), "layers": {"q_norm": {"weight": jnp.array([[3.0, 4.0], [0.0, 1.0]])}}})
    Array([1., 5., 4.], dtype=float32)
    """

    def squares(path: Any, leaf: Array) -> Array:
        return jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=tuple(range(is_stacked(path), leaf.ndim))).reshape(-1)

    return jnp.sqrt(_in_order([squares(*each) for each in jax.tree_util.tree_leaves_with_path(tree)], tree))


def norms_row(params: Any, norms: Any) -> dict[str, float]:
    """Columns of metrics.jsonl for what `Program.norms` computes of these parameters."""
    row = {}
    for name, (grad, weight, update) in zip(gradient_groups(params), np.asarray(norms).T.tolist(), strict=True):
        ratio = update / weight if weight else math.nan
        row |= {f"norms/{name}/grad": grad, f"norms/{name}/weight": weight, f"norms/{name}/update_ratio": ratio}
    return row


def _in_order(rows: list[Array], tree: Any) -> Array:
    """Values of the leaves of a tree, one for each layer of a stack, in the order of `gradient_groups`."""
    starts = np.concatenate([[0], np.cumsum([values.size for values in rows])])
    return jnp.concatenate(rows)[np.array([starts[leaf] + (row or 0) for _, leaf, row in _groups(tree)])]


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether no element of any leaf is an infinity or NaN.

    Check unscaled gradients: a division by a loss scale below 1 may add infinities.
    """
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def finite_rows(stack: Float[Array, "L ..."]) -> Bool[Array, " L"]:
    """Whether each row of the first axis, a layer of a stack, is finite."""
    return jnp.all(jnp.isfinite(stack), axis=tuple(range(1, stack.ndim)))


def _groups(params: Any) -> list[tuple[str, int, int | None]]:
    """Name, number of the leaf, and row of the leaf for layers of a stack."""
    found = []
    for leaf, (path, value) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        names = [str(getattr(part, "key", part)) for part in path]
        ranks = [(forward_rank(name), name) for name in names]
        if not is_stacked(path):
            found.append((ranks, "/".join(names), leaf, None))
            continue
        after = names.index("layers") + 1
        for row in range(value.shape[0]):
            name = "/".join([*names[:after], str(row), *names[after:]])
            found.append(([*ranks[:after], (row, ""), *ranks[after:]], name, leaf, row))
    found.sort(key=lambda group: group[0], reverse=True)
    return [group[1:] for group in found]
