"""Speculative decoding (arXiv 2211.17192): cheap drafts, verified several at once, without changing the result.

Greedy output is that of `generate`; sampled output has the same distribution. Drafts come from a smaller model, or from
prompt lookup: they are the tokens that followed the latest ones earlier in the text or in the encoder's input. Rows
advance by different counts, so the cache slot of a token is its position; rejected tokens are overwritten.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxllm.generation.edits import run_model
from jaxllm.generation.fallback import fall_back
from jaxllm.generation.loop import GenerateState, Reader, ban_end, ended, read_prompts
from jaxllm.generation.requests import Settings, make_request
from jaxllm.models import Model
from jaxllm.models.cache import KVCache
from jaxllm.models.decoder import Decoder
from jaxllm.ops.sampling import GREEDY, Sampling, choose, draw, most_probable, process

# Longest run of latest tokens that prompt lookup searches for; it falls back to shorter runs.
_LONGEST_RUN = 3


class Speculated(NamedTuple):
    """The result of a speculative generation.

    Attributes:
        rows: new tokens of each prompt, as `generate` returns them.
        tokens_per_step: new tokens for each forward of the large model, averaged over rows; 1 means no gain.
    """

    rows: list[list[int]]
    tokens_per_step: float


class Draft(NamedTuple):
    """Proposed tokens [B, k], and the drafting model's probabilities [B, k, V]; None where each draft is certain."""

    tokens: Int[Array, "B k"]
    probabilities: Float[Array, "B k V"] | None


class SpeculativeState(NamedTuple):
    """The carry of the loop."""

    cache: KVCache  # of the large model, without the last token of each row
    draft_cache: Any  # of the drafting model, with the same tokens; None with prompt lookup
    out: Int[Array, "B N"]  # new tokens
    counts: Int[Array, " B"]  # new tokens of each row so far
    steps: Int[Array, " B"]  # forwards of the large model before each row finished
    finished: Bool[Array, " B"]
    seen: Bool[Array, "B V"] | None  # ids that a repetition penalty counts, also in `out`; None without one


def generate_speculative(
    model: Model,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    drafts: int = 4,
    draft_model: Model | None = None,
    draft_params: Any = None,
    sampling: Sampling = GREEDY,
    eos_ids: Sequence[int] = (),
    pad_id: int = 0,
    seed: int | Sequence[int] = 0,
) -> Speculated:
    """As `generate`, in fewer forwards of the model; the other arguments are those of `generate`.

    `drafts` is the number of tokens proposed for each forward. `draft_model` is a smaller model of the same family and
    vocabulary, with its `draft_params`; without one, drafts are looked up in the prompt.

    Raises:
        ValueError: as `generate`, or for a draft model that doesn't fit.

    Example:
        >>> import jax, jaxllm
        >>> config = jaxllm.LlamaConfig(vocab_size=20, d_model=8, d_ff=8, num_layers=1, num_heads=2)
        >>> model = jaxllm.build(config)
        >>> params = jaxllm.init_params(model, jax.random.key(0))
        >>> prompts = [[1, 2, 3, 1, 2]]
        >>> quick = jaxllm.generate_speculative(model, params, prompts, max_new_tokens=6)
        >>> quick.rows == jaxllm.generate(model, params, prompts, max_new_tokens=6)
        True
    """
    _check_draft(model, draft_model, draft_params, drafts)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling, "eos_ids": eos_ids}
    options |= {"pad_id": pad_id, "seed": seed, "extra": drafts, "wraps": False}
    large = make_request(model, params, prompts, **options)
    # Without a draft model its settings and parameters are those of the large model, and unused.
    small = large if draft_model is None else make_request(draft_model, draft_params, prompts, **options)
    drafter = None if draft_model is None else small.decoder
    arguments = large.settings, small.settings, drafts, large.params, small.params, *large[3:]
    out = fall_back(lambda *decoders: _run(*decoders, *arguments), large.decoder, drafter)
    tokens, counts, steps = map(np.asarray, out)
    rows = [row[:count] for row, count in zip(tokens.tolist(), counts, strict=True)]
    # The first token of a row comes from reading its prompt.
    return Speculated(rows, float(np.sum(counts - 1) / max(1, np.sum(steps))))


def _check_draft(model: Model, draft_model: Model | None, draft_params: Any, drafts: int) -> None:
    if drafts < 1:
        raise ValueError(f"drafts must be at least 1, got {drafts}")
    if (draft_model is None) != (draft_params is None):
        raise ValueError("draft_model and draft_params go together")
    if draft_model is not None:
        ours, theirs = (f"{c.family} of {c.vocab_size} tokens" for c in (model.config, draft_model.config))
        if ours != theirs:
            raise ValueError(f"the draft model is a {theirs}, the model a {ours}; both must agree")


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _run(
    decoder: Decoder,
    draft_decoder: Decoder | None,
    settings: Settings,
    draft_settings: Settings,
    drafts: int,
    params: Any,
    draft_params: Any,
    tokens: Array,
    lengths: Array,
    keys: Array,
    limit: Array,
) -> tuple[Array, Array, Array]:
    large, begun = read_prompts(decoder, settings, params, tokens, lengths, keys)
    drafter, draft_cache = None, None
    if draft_decoder is not None:
        start, plan = draft_decoder.start, draft_settings.plan
        context, _, draft_cache, _ = run_model(start, draft_params, tokens, lengths, plan=plan)
        drafter = Reader(draft_decoder, draft_settings, draft_params, context)
    first_position = begun.positions

    def body(state: SpeculativeState) -> SpeculativeState:
        if drafter is None:
            draft = _look_up(*decoder.lookup(tokens, lengths, state.out, state.counts), drafts)
        else:
            positions = first_position + state.counts - 1
            draft, cache = _draft(drafter, state, positions, keys, drafts)
            state = state._replace(draft_cache=cache)
        return _verify(large, state, draft, first_position, keys, limit)

    state = _first(begun, draft_cache, settings, keys, limit)
    state = jax.lax.while_loop(lambda state: ~jnp.all(state.finished), body, state)
    return state.out, state.counts, state.steps


def _first(
    begun: GenerateState, draft_cache: KVCache | None, settings: Settings, keys: Array, limit: Array
) -> SpeculativeState:
    """The state with the first new token of each row, which the prompts alone predict."""
    zeros = jnp.zeros_like(begun.positions)
    seen = begun.seen
    logits = _processed(begun.logits[:, None], zeros, settings, None if seen is None else seen[:, None])
    first = _pick(logits, _keys(keys, zeros, 0), settings)[:, 0]
    out = jnp.full((first.shape[0], settings.plan.new), settings.pad_id, jnp.int32).at[:, 0].set(first)
    finished = ended(first, settings.eos_ids) | (limit <= 1)
    seen = None if seen is None else seen.at[jnp.arange(first.shape[0]), first].set(True)
    return SpeculativeState(begun.cache, draft_cache, out, zeros + 1, zeros, finished, seen)


def _keys(keys: Array, counts: Array, purpose: int | Array) -> Array:
    """A key per row for one purpose at its present count."""
    return jax.vmap(lambda key, count: jax.random.fold_in(jax.random.fold_in(key, count), purpose))(keys, counts)


def _processed(
    logits: Float[Array, "B T V"], counts: Int[Array, " B"], settings: Settings, seen: Bool[Array, "B T V"] | None
) -> Float[Array, "B T V"]:
    """The logits of tokens number counts, counts + 1, ... of each row, after the processors."""
    numbers, vocab = counts[:, None] + jnp.arange(logits.shape[1], dtype=jnp.int32), logits.shape[-1]
    banned = ban_end(settings, numbers.reshape(-1), vocab)
    seen = None if seen is None else seen.reshape(-1, vocab)
    return process(logits.reshape(-1, vocab), settings.sampling, seen=seen, banned=banned).reshape(logits.shape)


def _seen_along(seen: Bool[Array, "B V"] | None, drafts: Int[Array, "B k"]) -> Bool[Array, "B T V"] | None:
    """The ids that a penalty counts before each draft and after the last, if all earlier ones are accepted."""
    if seen is None:
        return None
    drafted = jnp.cumsum(jax.nn.one_hot(drafts, seen.shape[-1], dtype=jnp.int32), axis=1) > 0
    return seen[:, None] | jnp.pad(drafted, ((0, 0), (1, 0), (0, 0)))


def _pick(logits: Float[Array, "B T V"], keys: Array, settings: Settings) -> Int[Array, "B T"]:
    count = logits.shape[1]
    each = jax.vmap(lambda key: jax.random.split(key, count))(keys).reshape(-1)
    return choose(logits.reshape(-1, logits.shape[-1]), each, settings.sampling).reshape(logits.shape[:2])


def _last(state: SpeculativeState) -> Int[Array, "B 1"]:
    return jnp.take_along_axis(state.out, state.counts[:, None] - 1, axis=1)


def _look_up(source: Array, lengths: Array, said: Array, said_lengths: Array, drafts: int) -> Draft:
    """The tokens after the latest occurrence in `source` [B, W] of the longest run at the end of `said`."""

    def row(source: Array, length: Array, said: Array, said_length: Array) -> Array:
        index = jnp.arange(source.shape[0], dtype=jnp.int32)
        run, matching = jnp.zeros_like(index), index < length
        for back in range(1, _LONGEST_RUN + 1):
            # Position i continues a run if the `back` tokens before it are the last ones of `said`.
            wanted = said[said_length - back]
            matching &= (index >= back) & (said_length >= back) & (jnp.roll(source, back) == wanted)
            run += matching.astype(jnp.int32)
        best = jnp.argmax(run * source.shape[0] + jnp.where(run > 0, index, 0))
        return jax.lax.dynamic_slice_in_dim(jnp.pad(source, (0, drafts)), best, drafts)

    return Draft(jax.vmap(row)(source, lengths, said, said_lengths), None)


def _draft(
    drafter: Reader, state: SpeculativeState, positions: Array, keys: Array, drafts: int
) -> tuple[Draft, KVCache]:
    """Continues with the small model; one step more than drafts, so that its cache holds all of them."""
    settings = drafter.settings
    rows = jnp.arange(positions.shape[0])

    def step(carry: tuple[KVCache, Array, Array | None], i: Array) -> tuple[Any, tuple[Array, Array]]:
        cache, tokens, seen = carry
        logits, cache = drafter.extend(cache, tokens, (positions + i)[:, None])
        logits = _processed(logits, state.counts + i, settings, None if seen is None else seen[:, None])
        new = _pick(logits, _keys(keys, state.counts, 1 + i), settings)
        seen = None if seen is None else seen.at[rows, new[:, 0]].set(True)
        return (cache, new, seen), (new[:, 0], jax.nn.softmax(logits[:, 0]))

    carry = state.draft_cache, _last(state), state.seen
    (cache, *_), (tokens, probabilities) = jax.lax.scan(step, carry, jnp.arange(drafts + 1, dtype=jnp.int32))
    return Draft(tokens[:drafts].T, jnp.swapaxes(probabilities[:drafts], 0, 1)), cache


def _verify(
    large: Reader, state: SpeculativeState, draft: Draft, first_position: Array, keys: Array, limit: Array
) -> SpeculativeState:
    """One forward over the last token and the drafts; keeps those that the large model accepts, and one token more."""
    settings = large.settings
    fed = jnp.concatenate([_last(state), draft.tokens], axis=1)
    offsets = jnp.arange(fed.shape[1], dtype=jnp.int32)  # int64 with jax_enable_x64 unless the dtype is given
    positions = (first_position + state.counts - 1)[:, None] + offsets
    logits, cache = large.extend(state.cache, fed, positions)
    logits = _processed(logits, state.counts, settings, _seen_along(state.seen, draft.tokens))
    accept = _accept_greedy if settings.sampling.temperature == 0 else _accept_sampled
    accepted, tokens = accept(logits, draft, _keys(keys, state.counts, 0))
    ends = ended(tokens, settings.eos_ids) & (offsets <= accepted[:, None])
    until_end = jnp.where(jnp.any(ends, axis=1), jnp.argmax(ends, axis=1).astype(jnp.int32), accepted) + 1
    new = jnp.where(state.finished, 0, jnp.minimum(until_end, limit - state.counts))
    rows, kept = jnp.arange(fed.shape[0])[:, None], offsets < new[:, None]
    columns = jnp.where(kept, state.counts[:, None] + offsets, state.out.shape[1])
    out = state.out.at[rows, columns].set(tokens, mode="drop")
    seen = None if state.seen is None else state.seen.at[rows, tokens].max(kept)
    counts = state.counts + new
    last = _last(state._replace(out=out, counts=counts))[:, 0]
    stopped = state.finished | (counts >= limit) | ended(last, settings.eos_ids)
    steps = jnp.where(state.finished, state.steps, state.steps + 1)
    return SpeculativeState(cache, state.draft_cache, out, counts, steps, stopped, seen)


def _leading(true: Bool[Array, "B k"]) -> Int[Array, " B"]:
    """How many entries of each row are True before the first that is not."""
    return jnp.sum(jnp.cumprod(true.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)


def _accept_greedy(logits: Float[Array, "B T V"], draft: Draft, keys: Array) -> tuple[Array, Array]:
    """How many drafts equal the most probable tokens, and those tokens, including the one after."""
    tokens = most_probable(logits)
    return _leading(tokens[:, :-1] == draft.tokens), tokens


def _accept_sampled(logits: Float[Array, "B T V"], draft: Draft, keys: Array) -> tuple[Array, Array]:
    """Accepts draft x with probability min(1, p(x) / q(x)), else draws from max(p - q, 0).

    Samples then follow p. A draft that was looked up has q(x) = 1.
    """
    vocab, drafts = logits.shape[-1], draft.tokens.shape[1]
    p = jax.nn.softmax(logits)
    q = jax.nn.one_hot(draft.tokens, vocab, dtype=jnp.float32) if draft.probabilities is None else draft.probabilities
    p_x, q_x = (jnp.take_along_axis(x, draft.tokens[..., None], axis=-1)[..., 0] for x in (p[:, :-1], q))
    pair = jax.vmap(jax.random.split)(keys)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (drafts,), jnp.float32))(pair[:, 0])
    accepted = _leading(uniform * q_x < p_x)
    # After the last draft nothing was proposed, so the remainder is p itself.
    rest = jnp.maximum(p - jnp.pad(q, ((0, 0), (0, 1), (0, 0))), 0)
    rest = jnp.take_along_axis(rest, accepted[:, None, None], axis=1)[:, 0]
    drawn = draw(jnp.log(rest), pair[:, 1])
    tokens = jnp.pad(draft.tokens, ((0, 0), (0, 1)))
    return accepted, jnp.where(jnp.arange(drafts + 1) == accepted[:, None], drawn[:, None], tokens)
