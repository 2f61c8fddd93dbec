"""Continue prompts: all at once, or as a stream of chunks.

A host-side shell around `jaxllm.generation.loop`: checks and padding before, cutting rows at their end after. What
needs the host while tokens appear (a stream, stop strings, checking) goes chunk by chunk; everything else is one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxllm.generation import loop
from jaxllm.generation.fallback import fall_back
from jaxllm.generation.requests import Request, make_request
from jaxllm.generation.verify import check_checkable, check_recorded
from jaxllm.models import Model
from jaxllm.ops.sampling import GREEDY, Sampling

Decode = Callable[[list[int]], str]


def generate(
    model: Model,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    eos_ids: Sequence[int] = (),
    pad_id: int = 0,
    seed: int | Sequence[int] = 0,
    samples: int = 1,
    stop: Sequence[str] = (),
    decode: Decode | None = None,
    cache_dtype: str | None = None,
    check: bool = False,
) -> list[list[int]]:
    """New tokens after each prompt, up to `max_new_tokens`; a row ends with its first end token.

    Args:
        model: a decoder, which continues its prompts, or an encoder-decoder, which answers them.
        params: its parameters, stacked as in training or as `prepare_for_decode` makes them, or `edited`.
        prompts: token ids of each row; lengths may differ.
        max_new_tokens: most tokens to add.
        sampling: greedy by default; else e.g. `jaxllm.generation.Sampling(temperature=0.8, top_p=0.95)`.
        eos_ids: ids that end a row; they are part of the output.
        pad_id: fills the batch, and rows that have ended.
        seed: of the random choices; one per prompt makes a row independent of its place in the batch.
        samples: rows per prompt, next to each other in the result; the prompt is read once.
        stop: strings that end a row; it is cut after the token that completes one.
        decode: ids to text, needed by `stop`.
        cache_dtype: int8 halves or quarters the cache; None stores it in the compute dtype.
        check: recompute every step's logits by a full forward and compare; needs training parameters.

    Raises:
        ValueError: before anything is compiled, for an empty prompt, an id outside the vocabulary, no room in the
            model's context, parameters of another model, or settings that contradict each other.
        AssertionError: when `check` finds a step that differs.
    """
    if check:
        check_checkable(params, cache_dtype)
    _check_stop(stop, decode)
    request = make_request(
        model,
        params,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_ids=eos_ids,
        pad_id=pad_id,
        seed=seed,
        samples=samples,
        cache_dtype=cache_dtype,
        record=check,
    )
    out = _in_pieces(request, params, stop, decode, check) if stop or check else _at_once(request)
    return [_cut(row[:max_new_tokens], eos_ids, stop, decode) for row in out.tolist()]


def generate_stream(
    model: Model,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    eos_ids: Sequence[int] = (),
    pad_id: int = 0,
    seed: int | Sequence[int] = 0,
    samples: int = 1,
    stop: Sequence[str] = (),
    decode: Decode | None = None,
    cache_dtype: str | None = None,
) -> Iterator[list[list[int]]]:
    """As `generate`, yielding each row's new tokens chunk by chunk; a finished row yields empty lists."""
    request = make_request(
        model,
        params,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_ids=eos_ids,
        pad_id=pad_id,
        seed=seed,
        samples=samples,
        cache_dtype=cache_dtype,
    )
    _check_stop(stop, decode)
    return _stream(request, stop, decode)


def _at_once(request: Request) -> np.ndarray:
    _, *arguments = request
    return np.asarray(fall_back(lambda decoder: loop.run(decoder, *arguments), request.decoder))


def _in_pieces(request: Request, params: Any, stop: Sequence[str], decode: Decode | None, check: bool) -> np.ndarray:
    parts = list(_chunks(request, stop, decode))
    out = np.concatenate([tokens for tokens, _ in parts], axis=1)[:, : request.limit]
    if check:
        logits = np.concatenate([logits for _, logits in parts if logits is not None])
        check_recorded(request, params, out, logits[: request.limit])
    return out


def _stream(request: Request, stop: Sequence[str], decode: Decode | None) -> Iterator[list[list[int]]]:
    rows: list[list[int]] = [[] for _ in range(request.keys.shape[0])]
    sent = [0] * len(rows)
    for tokens, _ in _chunks(request, stop, decode):
        for row, part in zip(rows, tokens.tolist(), strict=True):
            row.extend(part)
        whole = [_cut(row[: request.limit], request.settings.eos_ids, stop, decode) for row in rows]
        yield [row[count:] for row, count in zip(whole, sent, strict=True)]
        sent = [max(count, len(row)) for row, count in zip(whole, sent, strict=True)]


def _chunks(
    request: Request, stop: Sequence[str], decode: Decode | None
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Tokens [B, T] and recorded logits [T, B, V] of each chunk until all rows have finished."""
    r = request
    _, *arguments, _ = request
    context, state = fall_back(lambda decoder: loop.begin(decoder, *arguments), r.decoder)
    stopped = np.zeros(r.keys.shape[0], bool)
    rows: list[list[int]] = [[] for _ in stopped]
    count = 0
    for attended, until in loop.segments(r.settings.plan, r.settings.chunk):
        while count < min(until, r.limit) and not stopped.all():
            state, (tokens, logits) = loop.next_chunk(
                r.decoder, r.settings, r.params, context, state, stopped, attended
            )
            chosen, count = np.asarray(tokens).T, count + r.settings.chunk
            yield chosen, None if logits is None else np.asarray(logits)
            for row, part in zip(rows, chosen.tolist(), strict=True):
                row.extend(part)
            stopped = np.asarray(state.finished) | [_stop_end(row, stop, decode) is not None for row in rows]


def _check_stop(stop: Sequence[str], decode: Decode | None) -> None:
    if isinstance(stop, str) or not all(stop):
        raise ValueError(f"stop must be a sequence of non-empty strings, got {stop!r}")
    if stop and decode is None:
        raise ValueError("stop strings need `decode`, which turns ids into text")


def _stop_end(row: list[int], stop: Sequence[str], decode: Decode | None) -> int | None:
    """Number of tokens until the text holds one of the strings, found by bisection; None when it doesn't."""
    if not stop or decode is None:
        return None

    def holds(count: int) -> bool:
        text = decode(row[:count])
        return any(part in text for part in stop)

    if not holds(len(row)):
        return None
    low, high = 0, len(row)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _cut(row: list[int], eos_ids: Sequence[int], stop: Sequence[str], decode: Decode | None) -> list[int]:
    ends = [i for i, token in enumerate(row) if token in eos_ids]
    row = row[: ends[0] + 1] if ends else row
    end = _stop_end(row, stop, decode)
    return row if end is None else row[:end]
