"""Who may attend to whom: a pattern, and its blocks as boolean masks [B, T, S] with True = attend.

Masks are compared lazily: each function is a broadcast comparison that XLA fuses into the scores. Padding is segment
id 0; documents packed into one row have ids from 1.
"""

from __future__ import annotations

from typing import NamedTuple

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


class Pattern(NamedTuple):
    """Which keys each query sees: everything, minus what the fields forbid.

    Attributes:
        causal: keys after the query are hidden; queries and keys then share one index.
        window: only the last `window` keys are seen.
        query_segments: document of each query [B, T]; None is one document.
        key_segments: document of each key [B, S], 0 = padding.
        query_lengths: real queries of each row [B], the rest is padding on the right; None is all.
        key_lengths: real keys of each row [B]; of a causal pattern with query_lengths, these.
        some_keys: every row has a real key: `key_lengths` are at least 1, which no kernel needs to make sure of.
    """

    causal: bool = False
    window: int | None = None
    query_segments: Int[Array, "B T"] | None = None
    key_segments: Int[Array, "B S"] | None = None
    query_lengths: Int[Array, " B"] | None = None
    key_lengths: Int[Array, " B"] | None = None
    some_keys: bool = False

    def mask(self, queries: range, keys: range) -> Array | None:
        """The mask of a block of queries and keys, [T, S] or [B, T, S] or what broadcasts to it; None hides nothing."""
        query_index, key_index = jnp.arange(queries.start, queries.stop), jnp.arange(keys.start, keys.stop)
        causal = causal_mask(query_index, key_index) if self.causal else None
        window = None
        if self.window is not None:
            window = window_mask(query_index, key_index, window=self.window)
        segments = None
        if self.query_segments is not None and self.key_segments is not None:
            queries_of = self.query_segments[:, queries.start : queries.stop]
            segments = segment_mask(queries_of, self.key_segments[:, keys.start : keys.stop])
        real_queries = None if self.query_lengths is None else (query_index < self.query_lengths[:, None])[:, :, None]
        real_keys = None if self.key_lengths is None else (key_index < self.key_lengths[:, None])[:, None, :]
        return combine(causal, window, segments, real_queries, real_keys)
