"""The tokens of each row so far, for the rules that look back: repetition penalty and n-grams that may not recur."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxllm.ops.sampling import Sampling


class History(NamedTuple):
    """The prompt and the new tokens of each row, in the carry of a decode loop."""

    tokens: Int[Array, "B S"]  # from the left; undefined from `lengths` on
    lengths: Int[Array, " B"]


def begin_history(sampling: Sampling, tokens: Int[Array, "B T"], real: Bool[Array, "B T"], new: int) -> History | None:
    """The history of prompts padded on the right, with room for so many new tokens; None if no rule looks back."""
    if sampling.repetition_penalty == 1 and not sampling.no_repeat_ngram_size:
        return None
    return History(jnp.pad(tokens, ((0, 0), (0, new))), jnp.sum(real, axis=1, dtype=jnp.int32))


def append(history: History, tokens: Int[Array, " B"]) -> History:
    """The history after one more token in each row."""
    rows = jnp.arange(tokens.shape[0])
    return History(history.tokens.at[rows, history.lengths].set(tokens), history.lengths + 1)


def seen(history: History, vocab: int) -> Bool[Array, "B V"]:
    """Which ids occur in each row."""
    real = jnp.arange(history.tokens.shape[1]) < history.lengths[:, None]
    return _marked(history.tokens, real, vocab)


def repeats(history: History, size: int, vocab: int) -> Bool[Array, "B V"]:
    """Which ids would complete an n-gram of `size` tokens that the row already has."""
    tokens, lengths = history.tokens, history.lengths[:, None]
    first = jnp.arange(tokens.shape[1])  # the token with which an n-gram begins
    match = first + size <= lengths
    for i in range(size - 1):
        newest = jnp.take_along_axis(tokens, jnp.maximum(lengths - size + 1 + i, 0), axis=1)
        match &= jnp.roll(tokens, -i, axis=1) == newest
    return _marked(jnp.roll(tokens, 1 - size, axis=1), match, vocab)


def _marked(tokens: Int[Array, "B S"], where: Bool[Array, "B S"], vocab: int) -> Bool[Array, "B V"]:
    rows = jnp.arange(tokens.shape[0])[:, None]
    return jnp.zeros((tokens.shape[0], vocab), bool).at[rows, tokens].max(where)
