"""The prompts, then chunks of steps: a scan of static length, and between chunks a test whether all rows have finished.

Each step chooses a token from the logits of the step before, then feeds it. `run` is a whole generation in one compiled
program, with its cache updated in place. `begin` and `next_chunk` are the same in pieces for streaming, with the state
donated. Attention reads only the first slots of the cache. Their number doubles as the text grows, and `run` has one
loop for each number. `fall_back` calls them where cuDNN may refuse the attention of a prompt.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllm.config import ModelConfig
from jaxllm.generation.edits import run_model
from jaxllm.generation.requests import Settings
from jaxllm.models.cache import KVCache, repeat_rows, repeat_tree
from jaxllm.models.decoder import Decoder, Plan
from jaxllm.ops.cudnn import or_chunked
from jaxllm.ops.sampling import Sampling, choose, process

# Decoders whose prompt cuDNN refused, with the config to use instead: a refused program is not compiled again.
_chunked: dict[Decoder, ModelConfig] = {}

R = TypeVar("R")


def fall_back(function: Callable[[Decoder], R], decoder: Decoder) -> R:
    """`function(decoder)`, by `or_chunked`; steps after the prompt attend to a cache and never use cuDNN."""

    def use(config: ModelConfig) -> R:
        if config is decoder.model.config:
            return function(decoder)
        _chunked[decoder] = config
        return function(replace(decoder, model=decoder.model.clone(config=config)))

    return or_chunked(use, _chunked.get(decoder) or decoder.model.config)


class History(NamedTuple):
    """The prompt and the new tokens of each row, for the rules of `Sampling` that look back."""

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


# A cache of fewer slots is always read whole: a smaller program is worth more than shorter reads.
_LEAST_ATTENDED = 256


class GenerateState(NamedTuple):
    """The carry of the decode loop."""

    cache: KVCache
    logits: Float[Array, "B V"]  # of the next token
    positions: Int[Array, " B"]  # of the next token
    finished: Bool[Array, " B"]  # rows that have emitted an end token; they emit padding
    count: Int[Array, ""]  # new tokens so far, the same for all rows
    keys: Array  # one PRNG key per row
    history: History | None  # None where no rule looks back


class Reader(NamedTuple):
    """A model that has read its prompts."""

    decoder: Decoder
    settings: Settings
    params: Any
    context: Any  # what the model keeps of the prompts in addition to its cache

    def step(self, state: GenerateState, tokens: Array, attended: int) -> tuple[Float[Array, "B V"], KVCache]:
        """Appends a token to each row; the logits of the next, and the cache."""
        arrays, plan = (self.context, state.cache, tokens, state.positions), self.settings.plan
        return run_model(self.decoder.step, self.params, *arrays, strict=False, plan=plan, attended=attended)


def read_prompts(
    decoder: Decoder, settings: Settings, params: Any, tokens: Array, lengths: Array, keys: Array
) -> tuple[Reader, GenerateState]:
    """The model and the state after the prompts; each prompt is read once for all of its samples."""
    context, logits, cache, positions = run_model(decoder.start, params, tokens, lengths, plan=settings.plan)
    history = begin_history(settings.sampling, *decoder.history(tokens, lengths), settings.plan.new)
    if settings.samples > 1:
        cache = repeat_rows(cache, settings.samples)
        context, logits, positions, history = repeat_tree((context, logits, positions, history), settings.samples)
    finished = jnp.zeros(positions.shape, bool)
    state = GenerateState(cache, logits, positions, finished, jnp.zeros((), jnp.int32), keys, history)
    return Reader(decoder, settings, params, context), state


def ended(tokens: Int[Array, "*B"], eos_ids: tuple[int, ...]) -> Bool[Array, "*B"]:
    """Which tokens are end tokens."""
    return jnp.isin(tokens, jnp.array(eos_ids, jnp.int32)) if eos_ids else jnp.zeros(tokens.shape, bool)


def processed(settings: Settings, state: GenerateState, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Logits, or log-probabilities, of the next token after all rules of `Sampling`."""
    sampling, vocab, history = settings.sampling, logits.shape[-1], state.history
    banned = found = None
    if sampling.min_new_tokens and settings.eos_ids:
        ends = ended(jnp.arange(vocab), settings.eos_ids)
        banned = ends & (state.count[None] < sampling.min_new_tokens)[..., None]
    if history is not None and sampling.no_repeat_ngram_size:
        completing = repeats(history, sampling.no_repeat_ngram_size, vocab)
        banned = completing if banned is None else banned | completing
    if history is not None and sampling.repetition_penalty != 1:
        found = seen(history, vocab)
    return process(logits, sampling, seen=found, banned=banned)


def advance(reader: Reader, state: GenerateState, *, attended: int) -> tuple[GenerateState, Int[Array, " B"]]:
    """One step: chooses the next tokens and feeds them."""
    settings = reader.settings
    logits = processed(settings, state, state.logits)
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.count)
    tokens = jnp.where(state.finished, settings.pad_id, choose(logits, keys, settings.sampling))
    finished = state.finished | ended(tokens, settings.eos_ids)
    history = None if state.history is None else append(state.history, tokens)
    after, cache = reader.step(state, tokens, attended)
    return GenerateState(cache, after, state.positions + 1, finished, state.count + 1, state.keys, history), tokens


def decode_chunk(reader: Reader, state: GenerateState, *, attended: int) -> tuple[GenerateState, Int[Array, "T B"]]:
    """`settings.chunk` steps, reading the first `attended` slots."""
    step = functools.partial(advance, reader, attended=attended)
    return jax.lax.scan(lambda carry, _: step(carry), state, None, length=reader.settings.chunk)


def read_lengths(plan: Plan, chunk: int) -> list[tuple[int, int]]:
    """Pairs (slots to read, new tokens that they suffice for); the slots double, the last pair reads all."""
    if plan.slots < plan.start + plan.new:  # a sliding window has wrapped around
        return [(plan.slots, plan.new)]
    pairs, done, attended = [], 0, _LEAST_ATTENDED
    # A separate loop pays as long as it reads less than four fifths of the slots.
    while attended * 5 // 4 < plan.slots:
        until = min((attended - plan.start) // chunk * chunk, plan.new)
        if until > done:
            pairs.append((attended, until))
            done = until
        attended *= 2
    return [*pairs, (plan.slots, plan.new)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(
    decoder: Decoder, settings: Settings, params: Any, tokens: Array, lengths: Array, keys: Array, limit: Array
) -> Int[Array, "B N"]:
    """A whole generation; columns from `limit` on are undefined, and those after an end token padding."""
    reader, state = read_prompts(decoder, settings, params, tokens, lengths, keys)
    out = jnp.full((state.positions.shape[0], settings.plan.new), settings.pad_id, jnp.int32)

    def unfinished(until: int, carry: tuple[GenerateState, Array]) -> Array:
        state, _ = carry
        return (state.count < jnp.minimum(until, limit)) & ~jnp.all(state.finished)

    def append_chunk(attended: int, carry: tuple[GenerateState, Array]) -> tuple[GenerateState, Array]:
        state, out = carry
        new, tokens = decode_chunk(reader, state, attended=attended)
        return new, jax.lax.dynamic_update_slice_in_dim(out, tokens.T, state.count, axis=1)

    for attended, until in read_lengths(settings.plan, settings.chunk):
        condition, body = functools.partial(unfinished, until), functools.partial(append_chunk, attended)
        state, out = jax.lax.while_loop(condition, body, (state, out))
    return out


@functools.partial(jax.jit, static_argnums=(0, 1))
def begin(
    decoder: Decoder, settings: Settings, params: Any, tokens: Array, lengths: Array, keys: Array
) -> tuple[Any, GenerateState]:
    """`read_prompts`, compiled: the context and first state for `next_chunk`."""
    reader, state = read_prompts(decoder, settings, params, tokens, lengths, keys)
    return reader.context, state


@functools.partial(jax.jit, static_argnums=(0, 1, 6), donate_argnums=4)
def next_chunk(
    decoder: Decoder,
    settings: Settings,
    params: Any,
    context: Any,
    state: GenerateState,
    stopped: Bool[Array, " B"],
    attended: int,
) -> tuple[GenerateState, Int[Array, "T B"]]:
    """One chunk; the state is donated. Rows in `stopped` are finished from now on."""
    state = state._replace(finished=state.finished | stopped)
    return decode_chunk(Reader(decoder, settings, params, context), state, attended=attended)
