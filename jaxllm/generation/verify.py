"""Decoding against the definition: each step's logits next to those of one full forward without a cache."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from jaxllm.generation.edits import without_edits
from jaxllm.generation.fallback import fall_back
from jaxllm.generation.requests import Request
from jaxllm.models.decoder import Decoder

# Largest difference relative to the largest logit; above it something is wrong, not rounded.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


def check_checkable(params: Any, cache_dtype: str | None) -> None:
    """Raises a ValueError for parameters that are already prepared, or an int8 cache, which is not meant to agree."""
    if not isinstance(without_edits(params), dict) or cache_dtype:
        raise ValueError("check compares with the training model: pass its parameters, and no cache_dtype")


def check_recorded(request: Request, params: Any, tokens: np.ndarray, logits: np.ndarray) -> None:
    """Compares the logits of each step [T, B, V] with a forward over the prompts and the tokens chosen [B, T].

    Raises:
        AssertionError: naming the row and step that differ most.
    """
    width = request.settings.plan.new
    new = np.zeros((tokens.shape[0], width), np.int32)
    new[:, : tokens.shape[1]] = tokens
    samples = request.settings.samples
    prompts, lengths = (np.repeat(x, samples, axis=0) for x in (request.tokens, request.lengths))
    arguments = request.settings.plan.length, params, prompts, lengths, new
    whole = fall_back(lambda decoder: full_logits(decoder, *arguments), request.decoder)
    want = np.asarray(whole)[:, : logits.shape[0]]
    difference = np.abs(np.swapaxes(logits, 0, 1) - want).max(axis=-1)  # [B, T]
    allowed = TOLERANCE[np.dtype(request.decoder.model.dtype).name] * max(1.0, float(np.abs(want).max()))
    # A finished row continues by padding; its steps are compared as well, since they are steps like others.
    if not difference.max() <= allowed:
        row, step = np.unravel_index(np.argmax(difference), difference.shape)
        raise AssertionError(
            f"decoding differs from a full forward: row {row}, new token {step}, logits by {difference.max():.3g} "
            f"(allowed {allowed:.3g})"
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def full_logits(
    decoder: Decoder, length: int | None, params: Any, tokens: jax.Array, lengths: jax.Array, new: jax.Array
) -> jax.Array:
    """`decoder.full_logits`, compiled."""
    return decoder.full_logits(params, tokens, lengths, new, length=length)
