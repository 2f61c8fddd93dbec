"""Whether decoded tokens are those of a forward pass over the longer prompt: a wrong cache write is fast, too.

The prompts are cut to a few tokens, in the same padded shape, so that nothing new is compiled and what is decoded soon
outweighs what was read. A decoder reads prompt and new tokens again as one prompt; an encoder-decoder feeds the new
tokens all at once. Near ties may fall either way, so a token is wrong only when its logit is clearly below the largest.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.generation import loop
from jaxllm.generation.requests import Request
from jaxllm.models.cache import KVCache, Turn, Update, plain_stores, visible_pairs
from jaxllm.models.t5 import decode as t5_decode
from jaxllm.ops.attention import masked_attention

# Tokens of the cut prompts.
_KEPT = 4
# Largest gap of a chosen logit to the largest, and largest error of all logits as a norm, in standard deviations of the
# logits. In bfloat16 on a CPU one toy layer has an error of 0.01, and 32 layers of d_model 256 have 0.03 and a gap of
# 0.04; writes that are lost or a slot away have 0.2 and more.
_ALLOWED = {"float32": 1e-3, "bfloat16": 0.15}


class Agreement(NamedTuple):
    """Of decoded tokens with a forward pass."""

    gap: float  # the largest by which a chosen logit is below the largest one, in standard deviations
    error: float  # of the logits after the chunk, in standard deviations
    allowed: float  # the most of both

    @property
    def good(self) -> bool:
        """Whether both are within what rounding explains."""
        return self.gap <= self.allowed and self.error <= self.allowed


def first_chunk(request: Request) -> Agreement:
    """Decodes a chunk after a cut prompt and compares it with a forward pass; compiles nothing for a decoder."""
    lengths = np.minimum(request.lengths, _KEPT)
    chosen, last = _decode(request, lengths)
    again = _feed_again if request.decoder.model.config.encoder_decoder else _read_again
    positions, logits = again(request, lengths, chosen)
    logits = np.asarray(logits, np.float32)  # [P, B, V]
    spread = logits.std(axis=-1)
    picked = np.take_along_axis(logits[:-1], chosen.T[positions[:-1], :, None], axis=-1)[..., 0]
    gap = (logits[:-1].max(axis=-1) - picked) / spread[:-1]
    error = np.sqrt(np.mean((np.asarray(last, np.float32) - logits[-1]) ** 2, axis=-1)) / spread[-1]
    dtype = jnp.dtype(request.decoder.model.dtype).name
    return Agreement(float(gap.max()), float(error.max()), _ALLOWED[dtype])


def _decode(request: Request, lengths: np.ndarray) -> tuple[np.ndarray, jax.Array]:
    """Tokens [B, N] of the first chunk, and the logits after it."""
    r = request
    context, state = loop.begin(r.decoder, r.settings, r.params, r.tokens, lengths, r.keys)
    attended, _ = loop.read_lengths(r.settings.plan, r.settings.chunk)[0]
    stopped = jnp.zeros(lengths.shape, bool)
    state, chosen = loop.next_chunk(r.decoder, r.settings, r.params, context, state, stopped, attended)
    return np.asarray(chosen).T, state.logits


def _read_again(request: Request, lengths: np.ndarray, chosen: np.ndarray) -> tuple[list[int], Any]:
    """Places in the chunk, its end last, and the logits that a prompt up to there gives."""
    r, count = request, chosen.shape[1]
    positions = sorted({0, 1, 2, 3, count // 4, count // 2, count - 1, count})
    tokens = np.array(r.tokens)
    for row, start in enumerate(lengths):
        tokens[row, start : start + count] = chosen[row]
    states = [loop.begin(r.decoder, r.settings, r.params, tokens, lengths + i, r.keys)[1] for i in positions]
    return positions, np.stack([np.asarray(state.logits, np.float32) for state in states])


def _feed_again(request: Request, lengths: np.ndarray, chosen: np.ndarray) -> tuple[list[int], Any]:
    """All places in the chunk after the first, its end last, and the logits when all of it is fed at once."""
    r, count = request, chosen.shape[1]
    context, state = loop.begin(r.decoder, r.settings, r.params, r.tokens, lengths, r.keys)
    feed = jax.jit(_feed_at_once, static_argnums=0)
    positions = state.positions[:, None] + np.arange(count)
    logits = feed(r.decoder.model, r.params, context, state.cache, chosen, positions)
    return list(range(1, count + 1)), jnp.swapaxes(logits, 0, 1)


def _feed_at_once(model: Any, params: Any, context: Any, cache: KVCache, tokens: Any, positions: Any) -> jax.Array:
    """Logits after each of several tokens per row of a T5, whose keys and values are scattered into their slots."""
    rows = jnp.arange(positions.shape[0])[:, None]
    held = cache.positions.at[rows, positions].set(positions)

    def write(store: Any, new: Any) -> Any:
        heads = jnp.swapaxes(new, 1, 2).reshape(-1, new.shape[1], new.shape[3])  # [R, T, H]
        slots = jnp.repeat(positions, new.shape[2], axis=0)
        return store.at[jnp.arange(len(slots))[:, None], slots].set(heads.astype(store.dtype))

    def attend(query: Any, keys: Any, values: Any, pairs: Any, *, scale: float) -> jax.Array:
        key, value = plain_stores(keys, values, query, pairs)
        return masked_attention(query, key, value, mask=pairs.mask, scale=scale, bias=pairs.bias)

    turn = Turn(Update(write, held, cache.slot), visible_pairs(held, positions), attend)
    return t5_decode.through_cache(model, params, context, cache, tokens, turn)[0]
