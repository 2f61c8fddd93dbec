"""Who may attend to whom, as boolean masks [B, T, S] with True = attend.

Masks are compared lazily: each function is a broadcast comparison that XLA fuses into the scores. Padding is segment
id 0; documents packed into one row have ids from 1.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def causal_mask(query_index: Int[Array, "*B T"], key_index: Int[Array, "*B S"]) -> Bool[Array, "*B T S"]:
    """True where the key does not come after the query."""
    return key_index[..., None, :] <= query_index[..., :, None]


def window_mask(
    query_index: Int[Array, "*B T"], key_index: Int[Array, "*B S"], *, window: int
) -> Bool[Array, "*B T S"]:
    """True where the key is one of the last `window` positions up to and including the query (Mistral)."""
    return query_index[..., :, None] - key_index[..., None, :] < window


def segment_mask(query: Int[Array, "B T"], key: Int[Array, "B S"]) -> Bool[Array, "B T S"]:
    """True where both belong to the same document and the key is not padding."""
    return (query[:, :, None] == key[:, None, :]) & (key[:, None, :] > 0)


def combine(*masks: Bool[Array, ...] | None) -> Bool[Array, ...] | None:
    """The conjunction of the masks given; None stands for all True."""
    result = None
    for mask in masks:
        if mask is not None:
            result = mask if result is None else jnp.logical_and(result, mask)
    return result
