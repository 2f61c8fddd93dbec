"""Decoding against its definition: each step's logits next to those of one full forward pass without a cache."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxllm.generation import generate, loop
from jaxllm.generation.edits import run_model
from jaxllm.generation.requests import Request, make_request
from tests.conftest import TOLERANCE


def generate_checked(model: Any, params: Any, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
    """`generate`; every step is recomputed from the training parameters without a cache."""
    request = make_request(model, params, prompts, **options)
    tokens, logits = steps(request)
    check_steps(request, params, tokens, logits)
    rows = generate(model, params, prompts, **options)
    assert [row[: len(new)] for row, new in zip(tokens.tolist(), rows, strict=True)] == rows
    return rows


def steps(request: Request) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a generation in chunks of one step [B, T], and the logits that they were chosen from [B, T, V]."""
    r, single = request, request.settings._replace(chunk=1)
    context, state = loop.begin(r.decoder, r.settings, r.params, r.tokens, r.lengths, r.keys)
    stopped = np.zeros(r.keys.shape[0], bool)
    tokens, logits = [], []
    for attended, until in loop.read_lengths(r.settings.plan, r.settings.chunk):
        while len(tokens) < min(until, r.limit):
            logits.append(np.array(state.logits))  # a copy: the state is donated
            state, chosen = loop.next_chunk(r.decoder, single, r.params, context, state, stopped, attended)
            tokens.append(np.asarray(chosen)[0])
    return np.stack(tokens, axis=1), np.stack(logits, axis=1)


def check_steps(request: Request, params: Any, tokens: np.ndarray, logits: np.ndarray) -> None:
    """Asserts that the logits of all steps agree; those of a finished row, which continues by padding, as well."""
    want = full_logits(request, params, tokens)
    difference = np.abs(logits - want).max(axis=-1)  # [B, T]
    allowed = TOLERANCE[np.dtype(request.decoder.model.dtype).name] * max(1.0, float(np.abs(want).max()))
    row, step = np.unravel_index(np.argmax(difference), difference.shape)
    message = f"row {row}, new token {step}: logits differ from a full forward by {difference.max()}, allowed {allowed}"
    assert difference.max() <= allowed, message


def full_logits(request: Request, params: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits that predict each token [B, T, V], by one forward pass of the training model over prompts and tokens."""
    r, plan = request, request.settings.plan
    new = np.zeros((tokens.shape[0], plan.new), np.int32)
    new[:, : tokens.shape[1]] = tokens
    prompts, lengths = (np.repeat(each, r.settings.samples, axis=0) for each in (r.tokens, r.lengths))
    forward = jax.jit(functools.partial(run_model, r.decoder.full_logits, length=plan.length))
    return np.asarray(forward(params, prompts, lengths, new))[:, : tokens.shape[1]]
