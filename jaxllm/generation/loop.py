"""Prefill, then chunks of steps: a scan of static length, and between chunks a look at who has finished.

Each step chooses a token from the logits it was handed, then feeds it. Rows that have finished go on emitting padding.
`run` is a whole generation in one compiled program, with the cache made and used in place inside; `begin` and
`next_chunk` are the same in pieces, the state donated, for streaming. Attention reads the first slots only, as many
as a power of two needs, which is why `run` loops once per power.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllm.generation.requests import Settings
from jaxllm.models.cache import KVCache, repeat_rows, repeat_tree
from jaxllm.models.decoder import Decoder, Plan
from jaxllm.ops.sampling import choose, process

# Fewer slots than this are read whole: a smaller program is worth more than shorter reads.
_LEAST_ATTENDED = 256


class GenerateState(NamedTuple):
    """The carry of the decode loop.

    Attributes:
        cache: keys and values so far.
        logits: of the next token [B, V].
        positions: of the next token [B].
        finished: rows that have emitted an end token [B].
        count: new tokens so far, the same for all rows.
        keys: one PRNG key per row.
        seen: tokens that a repetition penalty counts [B, V]; None without one.
    """

    cache: KVCache
    logits: Float[Array, "B V"]
    positions: Int[Array, " B"]
    finished: Bool[Array, " B"]
    count: Int[Array, ""]
    keys: Array
    seen: Bool[Array, "B V"] | None


def start(
    decoder: Decoder, settings: Settings, params: Any, tokens: Array, lengths: Array, keys: Array
) -> tuple[Any, GenerateState]:
    """Reads the prompts once, whatever the number of samples of each."""
    context, logits, cache, positions = decoder.start(params, tokens, lengths, settings.plan)
    seen = None
    if settings.sampling.repetition_penalty != 1:
        seen = mark_seen(*decoder.history(tokens, lengths), logits.shape[-1])
    if settings.samples > 1:
        cache = repeat_rows(cache, settings.samples)
        context, logits, positions, seen = repeat_tree((context, logits, positions, seen), settings.samples)
    finished = jnp.zeros(positions.shape, bool)
    return context, GenerateState(cache, logits, positions, finished, jnp.zeros((), jnp.int32), keys, seen)


def mark_seen(tokens: Int[Array, "B T"], real: Bool[Array, "B T"], vocab: int) -> Bool[Array, "B V"]:
    """Which ids occur among the real tokens of each row."""
    rows = jnp.arange(tokens.shape[0])[:, None]
    return jnp.zeros((tokens.shape[0], vocab), bool).at[rows, tokens].max(real)


def ended(tokens: Int[Array, "*B"], eos_ids: tuple[int, ...]) -> Bool[Array, "*B"]:
    """Which tokens are end tokens."""
    return jnp.isin(tokens, jnp.array(eos_ids, jnp.int32)) if eos_ids else jnp.zeros(tokens.shape, bool)


def ban_end(settings: Settings, count: Int[Array, ...], vocab: int) -> Bool[Array, "... V"] | None:
    """End tokens while fewer than min_new_tokens are out; None when that never matters."""
    if not (settings.sampling.min_new_tokens and settings.eos_ids):
        return None
    ends = ended(jnp.arange(vocab), settings.eos_ids)
    return ends & (count < settings.sampling.min_new_tokens)[..., None]


def advance(
    decoder: Decoder, settings: Settings, params: Any, context: Any, state: GenerateState, *, attended: int
) -> tuple[GenerateState, tuple[Array, Array | None]]:
    """One step: chooses the next tokens, feeds them; also the logits they were chosen from when recording."""
    banned = ban_end(settings, state.count[None], state.logits.shape[-1])
    logits = process(state.logits, settings.sampling, seen=state.seen, banned=banned)
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.count)
    tokens = jnp.where(state.finished, settings.pad_id, choose(logits, keys, settings.sampling))
    finished = state.finished | ended(tokens, settings.eos_ids)
    seen = None
    if state.seen is not None:
        seen = state.seen.at[jnp.arange(tokens.shape[0]), tokens].set(True)
    after, cache = decoder.step(params, context, state.cache, tokens, state.positions, settings.plan, attended)
    recorded = state.logits if settings.record else None
    new = GenerateState(cache, after, state.positions + 1, finished, state.count + 1, state.keys, seen)
    return new, (tokens, recorded)


def decode_chunk(
    decoder: Decoder, settings: Settings, params: Any, context: Any, state: GenerateState, *, attended: int
) -> tuple[GenerateState, tuple[Int[Array, "T B"], Float[Array, "T B V"] | None]]:
    """`settings.chunk` steps, reading the first `attended` slots."""
    step = functools.partial(advance, decoder, settings, params, context, attended=attended)
    return jax.lax.scan(lambda carry, _: step(carry), state, None, length=settings.chunk)


def segments(plan: Plan, chunk: int) -> list[tuple[int, int]]:
    """Pairs (slots to read, new tokens until which they suffice), the reads doubling; the last reads all."""
    if plan.slots < plan.start + plan.new:
        return [(plan.slots, plan.new)]
    parts, attended = [], _LEAST_ATTENDED
    while attended * 5 // 4 < plan.slots:
        until = min((attended - plan.start) // chunk * chunk, plan.new)
        if until > (parts[-1][1] if parts else 0):
            parts.append((attended, until))
        attended *= 2
    return [*parts, (plan.slots, plan.new)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(
    decoder: Decoder, settings: Settings, params: Any, tokens: Array, lengths: Array, keys: Array, limit: Array
) -> Int[Array, "B N"]:
    """A whole generation; columns from `limit` on, and those of a finished row, mean nothing or are padding."""
    context, state = start(decoder, settings, params, tokens, lengths, keys)
    out = jnp.full((state.positions.shape[0], settings.plan.new), settings.pad_id, jnp.int32)
    for attended, until in segments(settings.plan, settings.chunk):

        def unfinished(carry: tuple[GenerateState, Array], until: int = until) -> Array:
            return (carry[0].count < jnp.minimum(until, limit)) & ~jnp.all(carry[0].finished)

        def body(carry: tuple[GenerateState, Array], attended: int = attended) -> tuple[GenerateState, Array]:
            state, out = carry
            new, (chosen, _) = decode_chunk(decoder, settings, params, context, state, attended=attended)
            return new, jax.lax.dynamic_update_slice_in_dim(out, chosen.T, state.count, axis=1)

        state, out = jax.lax.while_loop(unfinished, body, (state, out))
    return out


@functools.partial(jax.jit, static_argnums=(0, 1))
def begin(
    decoder: Decoder, settings: Settings, params: Any, tokens: Array, lengths: Array, keys: Array
) -> tuple[Any, GenerateState]:
    """The state after the prompts, to be handed to `next_chunk`."""
    return start(decoder, settings, params, tokens, lengths, keys)


@functools.partial(jax.jit, static_argnums=(0, 1, 6), donate_argnums=4)
def next_chunk(
    decoder: Decoder,
    settings: Settings,
    params: Any,
    context: Any,
    state: GenerateState,
    stopped: Bool[Array, " B"],
    attended: int,
) -> tuple[GenerateState, tuple[Array, Array | None]]:
    """One chunk in place: the state handed in is gone. Rows in `stopped` count as finished from here on."""
    state = state._replace(finished=state.finished | stopped)
    return decode_chunk(decoder, settings, params, context, state, attended=attended)
