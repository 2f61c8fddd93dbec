"""From lists of ids to arrays of few shapes: every check before compilation, and the sizes that are compiled for.

Lengths are rounded up to a few buckets, so that another length in the same bucket compiles nothing.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxllm.generation.edits import prepare
from jaxllm.models import Model, decoder_of
from jaxllm.models.decoder import Decoder, Plan
from jaxllm.ops.sampling import GREEDY, Sampling

# New tokens between two tests whether all rows have finished; also the unit of the number of new tokens.
CHUNK = 32
_MOST = 1_000_000  # new tokens; a larger cache exceeds the memory of every device


class Settings(NamedTuple):
    """The values that are compiled into a loop."""

    plan: Plan
    chunk: int  # steps between two tests whether all rows have finished
    sampling: Sampling
    eos_ids: tuple[int, ...]
    pad_id: int  # emitted by finished rows
    samples: int = 1  # rows per prompt


class Request(NamedTuple):
    """All inputs of one generation."""

    decoder: Decoder
    settings: Settings
    params: Any  # in the decoding layout
    tokens: np.ndarray  # prompts [B, T], padded on the right to a bucket
    lengths: np.ndarray  # real tokens of each prompt [B]
    keys: jax.Array  # a PRNG key for each output row [B * samples]
    limit: int  # most new tokens


def bucket(count: int, smallest: int) -> int:
    """The least of smallest * (1, 2, 3, 4, 6, 8, 12, ...) that is not below count."""
    size = smallest
    while size < count:
        half = size + size // 2
        if size > smallest and half >= count:
            return half
        size *= 2
    return size


def make_request(
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
    cache_dtype: str | None = None,
    wraps: bool = True,
) -> Request:
    """Checks the arguments of `generate` and makes the arrays and sizes of one generation.

    With `wraps` the cache of a sliding window may be as short as the window.
    """
    decoder = decoder_of(model)
    check_outside(params, prompts, seed)
    _check_settings(model, sampling, max_new_tokens, eos_ids, pad_id, samples, cache_dtype)
    check_prompts(model, prompts, new=max_new_tokens)
    tokens, lengths = pad(prompts, bucket(max(map(len, prompts)), 16), pad_id)
    chunk = min(CHUNK, bucket(max_new_tokens, 4))
    needed = int(lengths.max()) + max_new_tokens
    new = bucket(max_new_tokens, chunk)
    plan = decoder.plan(prompt=tokens.shape[1], new=new, needed=needed, cache_dtype=cache_dtype, wraps=wraps)
    settings = Settings(plan, chunk, sampling, tuple(eos_ids), pad_id, samples)
    keys = _row_keys(seed, len(prompts), samples)
    return Request(decoder, settings, prepare(decoder, params), tokens, lengths, keys, max_new_tokens)


def pad(rows: Sequence[Sequence[int]], width: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows as one int32 array [B, width], padded on the right, and their lengths."""
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.full((len(rows), width), pad_id, np.int32)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    return tokens, lengths


def check_outside(*values: Any) -> None:
    """Raises a ValueError inside jax's transformations, where values are traced."""
    # The zero is a tracer inside jit even where no argument is one.
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((*values, jnp.zeros(())))):
        raise ValueError(
            "decoding works on lists, on the host: call it outside jax.jit, vmap and grad. Inside, `model.apply` gives "
            "logits that can be differentiated, and the decode modules of jaxllm.models.llama and .t5 give single steps"
        )


def check_prompts(model: Model, prompts: Sequence[Sequence[int]], *, new: int | Sequence[int]) -> None:
    """Raises a ValueError for a prompt that is empty, outside the vocabulary, or can't be continued by `new` tokens."""
    check_ids(model, prompts, name="prompt")
    decoder_of(model).check(prompts, new=new if isinstance(new, Sequence) else [new] * len(prompts))


def check_ids(model: Model, rows: Sequence[Sequence[int]], *, name: str) -> None:
    """Raises a ValueError unless there are rows, each a non-empty list of ids inside the vocabulary."""
    if len(rows) == 0:
        raise ValueError(f"at least one {name} is needed, got none")
    vocab = model.config.vocab_size
    for i, row in enumerate(rows):
        ids = np.asarray(row)
        if ids.shape == (0,):
            raise ValueError(f"{name} {i} needs at least one token; the end-of-text id begins a document")
        # Other kinds would be rounded to ids, or compared letter by letter.
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(f"{name} {i} must be a list of token ids such as [1, 2, 3], got {str(row)[:60]!r}")
        if ids.min() < 0 or ids.max() >= vocab:
            raise ValueError(f"{name} {i} has ids outside 0..{vocab - 1}: {ids.min()}..{ids.max()}")


def _check_settings(
    model: Model,
    sampling: Sampling,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    samples: int,
    cache_dtype: str | None,
) -> None:
    vocab = model.config.vocab_size
    _check_kinds(sampling, eos_ids, max_new_tokens=max_new_tokens, samples=samples, pad_id=pad_id)
    if not 1 <= max_new_tokens <= _MOST:  # a T5 has no longest context that would limit it
        raise ValueError(f"max_new_tokens must be from 1 to {_MOST}, got {max_new_tokens}")
    if sampling.min_new_tokens > max_new_tokens:
        raise ValueError(f"min_new_tokens {sampling.min_new_tokens} exceeds max_new_tokens {max_new_tokens}")
    outside = [i for i in (*eos_ids, pad_id) if not 0 <= i < vocab]
    if outside:
        raise ValueError(f"eos_ids and pad_id must be in 0..{vocab - 1}, got {outside}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if samples > 1 and sampling.temperature == 0:
        raise ValueError(f"{samples} greedy samples of one prompt would be equal; set a temperature above 0")
    if cache_dtype not in (None, "int8"):
        raise ValueError(f"cache_dtype must be int8 or None (the compute dtype), got {cache_dtype!r}")


def _check_kinds(sampling: Sampling, eos_ids: Sequence[int], **numbers: int) -> None:
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling must be a Sampling, e.g. Sampling(temperature=0.8), got {sampling!r}")
    if isinstance(eos_ids, int | np.integer):
        raise ValueError(f"eos_ids must be a list of ids, e.g. [{eos_ids}], got {eos_ids}")
    numbers |= {f"eos_ids[{i}]": each for i, each in enumerate(eos_ids)}
    for name, number in numbers.items():
        if not isinstance(number, int | np.integer):
            raise ValueError(f"{name} must be a whole number, got {number!r}")


def _row_keys(seed: int | Sequence[int], prompts: int, samples: int) -> jax.Array:
    """A key per output row, from its prompt's seed (or the seed and the prompt's index) and the sample's index."""
    if isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        raise ValueError("seed must be a whole number, or one per prompt, got a key of jax.random")
    given = np.asarray(seed)
    single, seeds = given.ndim == 0, given.reshape(-1).tolist()  # Python's numbers: those of jax overflow here
    if not all(isinstance(each, int) and 0 <= each < 2**32 for each in seeds):
        raise ValueError(f"seed must be a whole number in 0..2**32 - 1, got {seed}")
    base = jax.vmap(jax.random.key)(np.asarray(seeds, np.uint32))
    if single:
        base = jax.vmap(jax.random.fold_in, (None, 0))(base[0], np.arange(prompts))
    elif len(seeds) != prompts:
        raise ValueError(f"seed must be one number or one per prompt, got {len(seeds)} for {prompts} prompts")
    rows = jax.vmap(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(samples)))(base)
    return rows.reshape(-1)
