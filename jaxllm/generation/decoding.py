"""Continue prompts: all at once, or as a stream of chunks.

The host checks and pads the prompts, calls `jaxllm.generation.loop` and cuts rows at their end. Streaming and stop
strings need the host while tokens appear, so they run chunk by chunk; everything else is one call.
"""

import bisect
import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, TypeVar, cast

import numpy as np

from jaxllm.config.setting import settings_of
from jaxllm.generation import loop
from jaxllm.generation.loop import fall_back
from jaxllm.generation.requests import Request, make_request
from jaxllm.models import Model
from jaxllm.ops.sampling import GREEDY, Sampling

Decode = Callable[[list[int]], str]
F = TypeVar("F", bound=Callable[..., Any])


def _explained(function: F) -> F:
    """The function; its TypeError for an argument that belongs into `sampling` has the fix."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except TypeError:
            given = ", ".join(f"{name}={kwargs[name]!r}" for name in settings_of(Sampling) if name in kwargs)
            if not given:
                raise
            raise TypeError(f"{function.__name__} takes these as one argument: sampling=Sampling({given})") from None

    return cast(F, call)


@_explained
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
) -> list[list[int]]:
    """New tokens of each prompt and sample, without the prompt; a row ends with its first end token.

    Args:
        model: a decoder, which continues its prompts, or an encoder-decoder, which answers them.
        params: its parameters, stacked as in training or as `prepare_for_decode` makes them, or `edited`.
        prompts: token ids of each row; lengths may differ.
        max_new_tokens: most tokens to add.
        sampling: greedy by default; otherwise e.g. `jaxllm.Sampling(temperature=0.8, top_p=0.95)`.
        eos_ids: ids that end a row; the output includes them.
        pad_id: fills the batch, and rows that have ended.
        seed: of the random choices; one per prompt makes a row independent of its place in the batch.
        samples: rows per prompt, next to each other in the result; the prompt is read once.
        stop: strings that end a row; the row is cut after the token that completes one.
        decode: ids to text, needed by `stop`.
        cache_dtype: int8 halves or quarters the cache; None stores it in the compute dtype.

    Raises:
        ValueError: before anything is compiled, for an empty prompt, an id outside the vocabulary, no room in the
            model's context, parameters of another model, or settings that contradict each other.

    Example:
        >>> import jax, jaxllm
        >>> config = jaxllm.LlamaConfig(vocab_size=20, d_model=8, d_ff=8, num_layers=1, num_heads=2)
        >>> model = jaxllm.build(config)
        >>> params = jaxllm.init_params(model, jax.random.key(0))
        >>> rows = jaxllm.generate(model, params, [[1, 2, 3], [4]], max_new_tokens=5)
        >>> [len(row) for row in rows]
        [5, 5]
    """
    _check_stop(stop, decode)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling, "eos_ids": eos_ids}
    options |= {"pad_id": pad_id, "seed": seed, "samples": samples, "cache_dtype": cache_dtype}
    request = make_request(model, params, prompts, **options)
    if stop:
        pieces = list(_stream(request, stop, decode))
        return [list(chain(*row)) for row in zip(*pieces, strict=True)]
    decoder, *arguments = request
    rows = np.asarray(fall_back(lambda decoder: loop.run(decoder, *arguments), decoder)).tolist()
    return [_cut(row[:max_new_tokens], eos_ids, stop, decode) for row in rows]


@_explained
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
    """As `generate`, yielding each row's new tokens in chunks of at most 32; a finished row yields [].

    The arguments and errors are those of `generate`. Bad arguments raise at the call, before the first chunk.

    Example:
        >>> import jax, jaxllm
        >>> config = jaxllm.LlamaConfig(vocab_size=20, d_model=8, d_ff=8, num_layers=1, num_heads=2)
        >>> model = jaxllm.build(config)
        >>> params = jaxllm.init_params(model, jax.random.key(0))
        >>> for rows in jaxllm.generate_stream(model, params, [[1, 2, 3]], max_new_tokens=40):
        ...     print(len(rows[0]))
        32
        8
    """
    _check_stop(stop, decode)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling, "eos_ids": eos_ids}
    options |= {"pad_id": pad_id, "seed": seed, "samples": samples, "cache_dtype": cache_dtype}
    request = make_request(model, params, prompts, **options)
    return _stream(request, stop, decode)


def _stream(request: Request, stop: Sequence[str], decode: Decode | None) -> Iterator[list[list[int]]]:
    """New tokens of each row, chunk by chunk, until all rows have finished."""
    r, settings = request, request.settings
    context, state = fall_back(
        lambda decoder: loop.begin(decoder, settings, r.params, r.tokens, r.lengths, r.keys), r.decoder
    )
    stopped = np.zeros(r.keys.shape[0], bool)
    rows: list[list[int]] = [[] for _ in stopped]
    sent = [0] * len(rows)
    count = 0
    for attended, until in loop.read_lengths(settings.plan, settings.chunk):
        while count < min(until, r.limit) and not stopped.all():
            state, tokens = loop.next_chunk(r.decoder, settings, r.params, context, state, stopped, attended)
            count += settings.chunk
            for row, new in zip(rows, np.asarray(tokens).T.tolist(), strict=True):
                row.extend(new)
            whole = [_cut(row[: r.limit], settings.eos_ids, stop, decode) for row in rows]
            yield [row[first:] for row, first in zip(whole, sent, strict=True)]
            sent = [max(first, len(row)) for row, first in zip(whole, sent, strict=True)]
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

    return bisect.bisect_left(range(len(row)), True, key=holds) if holds(len(row)) else None


def _cut(row: list[int], eos_ids: Sequence[int], stop: Sequence[str], decode: Decode | None) -> list[int]:
    ends = [i for i, token in enumerate(row) if token in eos_ids]
    row = row[: ends[0] + 1] if ends else row
    end = _stop_end(row, stop, decode)
    return row if end is None else row[:end]
