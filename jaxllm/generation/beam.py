"""Beam search with the rules of transformers (`_beam_search` in transformers/generation/utils.py).

One compiled loop serves both families. The beams of a prompt share its prefill. After each step the cache is reordered
to follow the chosen parents.
"""

import functools
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxllm.config.setting import at_least, require
from jaxllm.config.setting import settings as declare
from jaxllm.generation.loop import GenerateState, append, ended, fall_back, processed, read_lengths, read_prompts
from jaxllm.generation.requests import Settings, make_request
from jaxllm.models import Model
from jaxllm.models.cache import reorder_rows
from jaxllm.models.decoder import Decoder
from jaxllm.ops.sampling import Sampling

# Added to a score to rule a beam out, as in transformers; finite, so that sums stay ordered.
_RULED_OUT = -1e9


class Beam(NamedTuple):
    """One finished beam."""

    tokens: list[int]  # new tokens, including the end token
    score: float  # sum of log-probabilities / number of tokens ** length_penalty


@declare
class BeamSettings:
    """Options of a beam search; hashable, so that it can be a static argument."""

    beams: Annotated[int, at_least(2), "number of beams kept at every step; one beam is a greedy generate"]
    length_penalty: Annotated[float, "exponent of the length that divides a score; above 0 favours long outputs"] = 1.0
    early_stopping: Annotated[
        bool | Literal["never"],
        "True ends a row once `beams` have finished. False ends it once the best running beam, at its present length, "
        "can't beat the worst finished one; never compares at the longest possible length",
    ] = False
    returned: Annotated[int, at_least(1), "number of beams to return for each row, at most `beams`"] = 1

    def __post_init__(self) -> None:
        require(self.returned <= self.beams, f"returned must be in 1..{self.beams} (beams), got {self.returned}")


class BeamState(NamedTuple):
    """The carry of the search: K running beams of each prompt, and the best K finished ones."""

    decoding: GenerateState  # of the running beams; its rows are beams, those of a prompt next to each other
    tokens: Int[Array, "B K N"]
    scores: Float[Array, "B K"]  # sums of log-probabilities, best first
    done_tokens: Int[Array, "B K N"]
    done_lengths: Int[Array, "B K"]
    done_scores: Float[Array, "B K"]  # normalised, best first
    done: Bool[Array, "B K"]  # which finished beams exist
    improvable: Bool[Array, " B"]  # rows that may still find a better beam
    ending: Bool[Array, ""]  # whether all candidates of the last step ended


def beam_search(
    model: Model,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    search: BeamSettings,
    eos_ids: Sequence[int] = (),
    pad_id: int = 0,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    min_new_tokens: int = 0,
    cache_dtype: str | None = None,
) -> list[list[Beam]]:
    """The `search.returned` best beams of each prompt, best first.

    A beam ends at an end token or at `max_new_tokens`. `repetition_penalty`, `no_repeat_ngram_size` and
    `min_new_tokens` are those of `Sampling`; the other arguments are those of `generate`.

    Raises:
        ValueError: as `generate`, or for fewer tokens in the vocabulary than candidates.

    Example:
        >>> import jax, jaxllm
        >>> config = jaxllm.LlamaConfig(vocab_size=20, d_model=8, d_ff=8, num_layers=1, num_heads=2)
        >>> model = jaxllm.build(config)
        >>> params = jaxllm.init_params(model, jax.random.key(0))
        >>> search = jaxllm.BeamSettings(beams=3, returned=2)
        >>> found = jaxllm.beam_search(model, params, [[1, 2, 3], [4]], max_new_tokens=5, search=search)
        >>> [[len(beam.tokens) for beam in beams] for beams in found]
        [[5, 5], [5, 5]]
    """
    if not isinstance(search, BeamSettings):
        raise ValueError(f"search must be a BeamSettings, e.g. BeamSettings(beams=4), got {search!r}")
    vocab_size, candidates = model.config.vocab_size, max(2, 1 + len(eos_ids)) * search.beams
    if candidates > search.beams * vocab_size:
        raise ValueError(f"{candidates} candidates exceed {search.beams} beams of {vocab_size} tokens")
    sampling = Sampling(
        repetition_penalty=repetition_penalty,
        no_repeat_ngram_size=no_repeat_ngram_size,
        min_new_tokens=min_new_tokens,
    )
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling, "eos_ids": eos_ids}
    options |= {"pad_id": pad_id, "cache_dtype": cache_dtype, "wraps": False}
    request = make_request(model, params, prompts, **options)
    decoder, *arguments = request._replace(settings=request.settings._replace(samples=search.beams))
    out = fall_back(lambda decoder: _search(decoder, search, *arguments), decoder)
    tokens, lengths, scores = (np.asarray(each)[:, : search.returned].tolist() for each in out)
    return [
        [Beam(ids[:count], score) for ids, count, score in zip(*row, strict=True)]
        for row in zip(tokens, lengths, scores, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _search(
    decoder: Decoder,
    search: BeamSettings,
    settings: Settings,
    params: Any,
    tokens: Array,
    lengths: Array,
    keys: Array,
    limit: Array,
) -> tuple[Array, Array, Array]:
    reader, decoding = read_prompts(decoder, settings, params, tokens, lengths, keys)
    state = _init(decoding, search.beams, settings)

    def unfinished(until: int, state: BeamState) -> Array:
        open_beams = ~(jnp.all(state.done) & (search.early_stopping is True))
        more = state.decoding.count < jnp.minimum(until, limit)
        return more & jnp.any(state.improvable) & open_beams & ~state.ending

    def grow(attended: int, state: BeamState) -> BeamState:
        new, chosen = _select(state, settings, search, limit)
        d = new.decoding
        logits, cache = reader.step(d, chosen, attended)
        return new._replace(decoding=d._replace(cache=cache, logits=logits, positions=d.positions + 1))

    for attended, until in read_lengths(settings.plan, 1):
        condition, body = functools.partial(unfinished, until), functools.partial(grow, attended)
        state = jax.lax.while_loop(condition, body, state)
    return state.done_tokens, state.done_lengths, state.done_scores


def _init(decoding: GenerateState, beams: int, settings: Settings) -> BeamState:
    rows = decoding.positions.shape[0] // beams
    tokens = jnp.full((rows, beams, settings.plan.new), settings.pad_id, jnp.int32)
    # All beams start equal: only the first may be continued.
    scores = jnp.zeros((rows, beams)).at[:, 1:].set(_RULED_OUT)
    return BeamState(
        decoding=decoding,
        tokens=tokens,
        scores=scores,
        done_tokens=tokens,
        done_lengths=jnp.zeros((rows, beams), jnp.int32),
        done_scores=jnp.full((rows, beams), _RULED_OUT),
        done=jnp.zeros((rows, beams), bool),
        improvable=jnp.ones(rows, bool),
        ending=jnp.zeros((), bool),
    )


def _select(
    state: BeamState, settings: Settings, search: BeamSettings, limit: Array
) -> tuple[BeamState, Int[Array, " B"]]:
    """The state with the next running and the updated finished beams, and the token to feed to each beam."""
    d, (rows, beams) = state.decoding, state.scores.shape
    vocab = d.logits.shape[-1]
    steps = processed(settings, d, jax.nn.log_softmax(d.logits))
    totals = (steps.reshape(rows, beams, vocab) + state.scores[..., None]).reshape(rows, beams * vocab)
    # Enough candidates that `beams` of them continue even if all end tokens are among them.
    totals, index = jax.lax.top_k(totals, max(2, 1 + len(settings.eos_ids)) * beams)  # [B, C]
    parents, chosen = index // vocab, index % vocab
    tokens = jnp.take_along_axis(state.tokens, parents[..., None], axis=1)
    tokens = jax.lax.dynamic_update_slice_in_dim(tokens, chosen[..., None], d.count, axis=2)
    ends = ended(chosen, settings.eos_ids) | (d.count + 1 >= limit)

    going, best = jax.lax.top_k(totals + jnp.where(ends, _RULED_OUT, 0), beams)
    done = _finish(state, search, tokens, totals, ends)
    rows_of = jnp.arange(rows)[:, None] * beams + jnp.take_along_axis(parents, best, axis=1)
    chosen = jnp.take_along_axis(chosen, best, axis=1).reshape(-1)
    rows_of = rows_of.reshape(-1)
    history = None if d.history is None else append(jax.tree.map(lambda each: each[rows_of], d.history), chosen)
    cache = reorder_rows(d.cache, rows_of, start=settings.plan.start)
    new = done._replace(
        decoding=d._replace(cache=cache, count=d.count + 1, history=history),
        tokens=jnp.take_along_axis(tokens, best[..., None], axis=1),
        scores=going,
        ending=jnp.all(ends),
    )
    return new._replace(improvable=new.improvable & _can_improve(new, search, limit)), chosen


def _finish(state: BeamState, search: BeamSettings, tokens: Array, totals: Array, ends: Array) -> BeamState:
    """Merges the candidates that ended into the best finished beams."""
    beams, length = state.scores.shape[1], state.decoding.count + 1
    finishing = ends & (jnp.arange(totals.shape[1]) < beams)
    full = jnp.all(state.done, axis=1, keepdims=True) & (search.early_stopping is True)
    closed = full | ~state.improvable[:, None]
    scores = totals / length.astype(jnp.float32) ** search.length_penalty
    scores += jnp.where(closed, _RULED_OUT, 0) + jnp.where(finishing, 0, _RULED_OUT)
    scores, best = jax.lax.top_k(jnp.concatenate([state.done_scores, scores], axis=1), beams)

    def merged(old: Array, new: Array) -> Array:
        both = jnp.concatenate([old, new], axis=1)
        return jnp.take_along_axis(both, best.reshape(*best.shape, *[1] * (both.ndim - 2)), axis=1)

    return state._replace(
        done_tokens=merged(state.done_tokens, tokens),
        done_lengths=merged(state.done_lengths, jnp.full(totals.shape, length)),
        done_scores=scores,
        done=merged(state.done, finishing),
    )


def _can_improve(state: BeamState, search: BeamSettings, limit: Array) -> Bool[Array, " B"]:
    """Whether the best running beam may still beat the worst finished one, by the rule of `early_stopping`."""
    longest = search.early_stopping == "never" and search.length_penalty > 0
    length = jnp.asarray(limit if longest else state.decoding.count, jnp.float32)
    reachable = state.scores[:, :1] / length**search.length_penalty
    worst = jnp.where(state.done, jnp.min(state.done_scores, axis=1, keepdims=True), _RULED_OUT)
    return jnp.any(reachable > worst, axis=1)
