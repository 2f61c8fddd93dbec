"""Which keys a query attends to: a pattern, and its blocks as boolean masks [B, T, S] with True = attend.

Each mask is a broadcast comparison that XLA fuses into the scores. Padding is segment id 0; documents packed into one
row have ids from 1.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class Pattern(NamedTuple):
    """Which keys each query sees: everything, minus what the fields forbid."""

    causal: bool = False  # keys after the query are masked; queries and keys then share one index
    window: int | None = None  # only the last `window` keys up to and including the query are seen (Mistral)
    query_segments: Int[Array, "B T"] | None = None  # document of each query [B, T]; None is one document
    key_segments: Int[Array, "B S"] | None = None  # document of each key [B, S], 0 = padding
    # real queries of each row [B], the rest is padding on the right; None is all
    query_lengths: Int[Array, " B"] | None = None
    # real keys of each row [B]; equal to query_lengths where a causal pattern has both
    key_lengths: Int[Array, " B"] | None = None
    some_keys: bool = False  # `key_lengths` are at least 1, so that no kernel has to bound them

    def mask(self, queries: range, keys: range) -> Array | None:
        """The mask of a block of queries and keys, [T, S] or [B, T, S] or what broadcasts to it; None is all True."""
        query_index, key_index = jnp.arange(queries.start, queries.stop), jnp.arange(keys.start, keys.stop)
        masks = []
        if self.causal:
            masks.append(key_index[None, :] <= query_index[:, None])
        if self.window is not None:
            masks.append(query_index[:, None] - key_index[None, :] < self.window)
        if self.query_segments is not None and self.key_segments is not None:
            query_of = self.query_segments[:, queries.start : queries.stop]
            key_of = self.key_segments[:, keys.start : keys.stop]
            masks.append((query_of[:, :, None] == key_of[:, None, :]) & (key_of[:, None, :] > 0))
        if self.query_lengths is not None:
            masks.append((query_index < self.query_lengths[:, None])[:, :, None])
        if self.key_lengths is not None:
            masks.append((key_index < self.key_lengths[:, None])[:, None, :])
        return functools.reduce(jnp.logical_and, masks) if masks else None
