"""Whether gradients are finite: of a whole tree, or of each layer of a stack."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether no element of any leaf is an infinity or NaN.

    Check unscaled gradients: a division by a loss scale below 1 may add infinities.

    >>> bool(all_finite({"w": jnp.array([1.0, jnp.nan])}))
    False
    """
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def finite_rows(stack: Float[Array, "L ..."]) -> Bool[Array, " L"]:
    """Whether each row of the first axis, a layer of a stack, is finite.

    >>> finite_rows(jnp.array([[1.0, jnp.inf], [3.0, 4.0]])).tolist()
    [False, True]
    """
    return jnp.all(jnp.isfinite(stack), axis=tuple(range(1, stack.ndim)))
