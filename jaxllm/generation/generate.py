"""Prefill, then a scan that carries the cache: one compiled program per (model, shapes, settings).

Rows that have finished go on emitting padding. Sampling mathematics is in `jaxllm.ops.sampling`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxllm.models.cache import KVCache
from jaxllm.models.layers import apply
from jaxllm.models.llama import Llama, prepare_for_decode
from jaxllm.ops.sampling import Sampling, sample

GREEDY = Sampling()


class GenerateState(NamedTuple):
    """The carry of the decode loop.

    Attributes:
        cache: keys and values so far.
        tokens: last token of each row [B], not yet in the cache.
        positions: its position [B].
        finished: rows that have emitted an end token [B].
    """

    cache: KVCache
    tokens: Int[Array, " B"]
    positions: Int[Array, " B"]
    finished: Array


def generate(
    model: Llama,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    eos_ids: Sequence[int] = (),
    pad_id: int = 0,
    seed: int = 0,
) -> list[list[int]]:
    """Continues each prompt by up to `max_new_tokens`; a row ends with its first end token.

    Args:
        model: a decoder.
        params: its parameters, stacked as in training or as `prepare_for_decode` makes them.
        prompts: token ids of each row; lengths may differ.
        max_new_tokens: most tokens to add.
        sampling: greedy by default.
        eos_ids: ids that end a row; they are part of the output.
        pad_id: fills the batch, and rows that have ended.
        seed: of the random choices.

    Raises:
        ValueError: for an empty prompt, an id outside the vocabulary, or no room in the model's context.
    """
    _check(model, prompts, max_new_tokens)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.full((len(prompts), int(lengths.max())), pad_id, np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    if not isinstance(params["layers"], tuple):
        params = prepare_for_decode(params, dtype=model.dtype)
    out = _run(model, max_new_tokens, sampling, tuple(eos_ids), pad_id, params, tokens, lengths, jax.random.key(seed))
    return [_cut(row, eos_ids) for row in np.asarray(out).tolist()]


def _check(model: Llama, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("every prompt needs at least one token; start with the end-of-text id to begin a document")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    vocab = model.config.vocab_size
    for prompt in prompts:
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise ValueError(f"prompt holds ids outside 0..{vocab - 1}: {min(prompt)}..{max(prompt)}")


def _cut(row: list[int], eos_ids: Sequence[int]) -> list[int]:
    ends = [i for i, token in enumerate(row) if token in eos_ids]
    return row[: ends[0] + 1] if ends else row


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _run(
    model: Llama,
    steps: int,
    sampling: Sampling,
    eos_ids: tuple[int, ...],
    pad_id: int,
    params: Any,
    prompts: Array,
    lengths: Array,
    key: Array,
) -> Array:
    # The last token is returned but never fed back, so it needs no slot.
    capacity = prompts.shape[1] + steps - 1
    logits, cache = apply(model, params, prompts, lengths, capacity=capacity, method="prefill")

    def choose(logits: Array, finished: Array, step_key: Array) -> tuple[Array, Array]:
        tokens = jnp.where(finished, pad_id, sample(logits, step_key, sampling))
        ended = jnp.isin(tokens, jnp.array(eos_ids, jnp.int32)) if eos_ids else jnp.zeros_like(finished)
        return tokens, finished | ended

    def body(state: GenerateState, step_key: Array) -> tuple[GenerateState, Array]:
        logits, cache = apply(model, params, state.cache, state.tokens, state.positions, method="decode_step")
        tokens, finished = choose(logits, state.finished, step_key)
        return GenerateState(cache, tokens, state.positions + 1, finished), tokens

    keys = jax.random.split(key, steps)
    first, finished = choose(logits, jnp.zeros(lengths.shape, bool), keys[0])
    state = GenerateState(cache, first, lengths, finished)
    _, rest = jax.lax.scan(body, state, keys[1:])
    return jnp.concatenate([first[:, None], rest.T], axis=1)
