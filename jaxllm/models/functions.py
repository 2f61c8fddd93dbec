"""A model's own attention or position function: its arguments, the same in training, scoring and decoding.

`jaxllm.build(config).clone(attend=function)` is a model with one; docs/extending.md has examples. The functions are
static: two models are equal, and share compiled programs, when their functions are the same objects.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllm.ops.masks import Pattern


class Pairs(NamedTuple):
    """The pairs of queries and keys.

    Attributes:
        mask: pairs that may attend.
        query_positions: of the queries in their documents or rows.
        key_positions: of the keys; -1 in an empty slot of a cache.
        bias: T5's relative bias, or None.
        drop: dropout of the attention weights; None outside training.
    """

    mask: Bool[Array, "#B T S"]
    query_positions: Int[Array, "#B T"]
    key_positions: Int[Array, "#B S"]
    bias: Float[Array, "#B N T S"] | None = None
    drop: Callable[[Array], Array] | None = None


# Queries [B, T, N, H], keys and values [B, S, K, H] to the mixed values [B, T, N, H]; the scale is the function's own.
Attend = Callable[[Array, Array, Array, Pairs], Array]
# Queries or keys [B, T, N, H] and their positions [#B, T] to queries or keys that contain the positions.
Rotate = Callable[[Array, Array], Array]
# (table [R, N], positions of queries [#B, T], of keys [#B, S], bidirectional=) to T5's bias of scores [#B, N, T, S];
# only the encoder's is bidirectional.
PositionBias = Callable[..., Array]


def dense_mask(pattern: Pattern, queries: int, keys: int) -> Bool[Array, "#B T S"]:
    """The mask of whole sequences."""
    mask = pattern.mask(range(queries), range(keys))
    if mask is None:
        mask = jnp.ones((queries, keys), bool)
    return mask[None] if mask.ndim == 2 else mask
