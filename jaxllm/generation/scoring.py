"""Log-probabilities of given continuations: one forward of the training model, no cache."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllm.generation.edits import run_model, without_edits
from jaxllm.generation.loop import fall_back
from jaxllm.generation.requests import bucket, check_ids, check_outside, check_prompts, pad
from jaxllm.models import Model, check_params, decoder_of
from jaxllm.models.decoder import Decoder
from jaxllm.ops.backend import fast_argmax

Ids = Sequence[Sequence[int]]  # rows of token ids


def score(model: Model, params: Any, prompts: Ids, continuations: Ids, *, pad_id: int = 0) -> list[list[float]]:
    """Log-probability of each token of each continuation, given its prompt and the tokens before it.

    There is one continuation per prompt; an encoder-decoder's encoder reads the prompt. Parameters are those of
    training, or `edited`. Logarithms are natural.

    Raises:
        ValueError: for rows that are empty, outside the vocabulary, unpaired or longer than the context, or parameters
            of another model.

    Example:
        >>> import jax, jaxllm
        >>> config = jaxllm.LlamaConfig(vocab_size=20, d_model=8, d_ff=8, num_layers=1, num_heads=2)
        >>> model = jaxllm.build(config)
        >>> params = jaxllm.init_params(model, jax.random.key(0))
        >>> rows = jaxllm.score(model, params, [[1, 2, 3], [4]], [[5, 6], [7]])
        >>> [len(row) for row in rows], rows[0][0] < 0
        ([2, 1], True)
    """
    return [row for row, _ in score_greedy(model, params, prompts, continuations, pad_id=pad_id)]


def score_greedy(
    model: Model, params: Any, prompts: Ids, continuations: Ids, *, pad_id: int = 0
) -> list[tuple[list[float], bool]]:
    """As `score`, each row with whether its continuation is the greedy one: every token the most probable there."""
    decoder = decoder_of(model)
    check_outside(params, prompts, continuations)
    check_params(model, without_edits(params))
    if len(prompts) != len(continuations):
        raise ValueError(f"each prompt needs one continuation: got {len(prompts)} and {len(continuations)}")
    check_ids(model, continuations, name="continuation")
    longest = max(map(len, continuations))
    check_prompts(model, prompts, new=list(map(len, continuations)))
    tokens, lengths = pad(prompts, bucket(max(map(len, prompts)), 16), pad_id)
    new, counts = pad(continuations, bucket(longest, 16), pad_id)
    sizes = {"prompt": tokens.shape[1], "new": new.shape[1], "needed": int(lengths.max()) + longest}
    plan = decoder.plan(**sizes, cache_dtype=None, wraps=False)
    arguments = plan.length, params, tokens, lengths, new
    found = jax.device_get(fall_back(lambda each: _log_probabilities(each, *arguments), decoder))
    return [(row[:count].tolist(), bool(best[:count].all())) for row, best, count in zip(*found, counts, strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _log_probabilities(
    decoder: Decoder,
    length: int | None,
    params: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    new: Int[Array, "B N"],
) -> tuple[Float[Array, "B N"], Bool[Array, "B N"]]:
    logits = run_model(decoder.full_logits, params, tokens, lengths, new, length=length)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), new[..., None], axis=-1)[..., 0], fast_argmax(logits) == new
