"""Training objectives: span corruption, UL2's mixture of it, prefix-LM, next token; each with its inverse.

Pure functions on NumPy arrays, over a batch of equally long pieces of text: a generator and tokens in, (inputs,
targets) out, both with the end-of-text token at the end. No token is stripped, padded or dropped. Text must not contain
sentinels; other ids have no meaning here. Out of scope: where text comes from, and packing into rows.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxllm.config import DataConfig
from jaxllm.data import DataError

Tokens = np.ndarray  # int32, [n] or [rows, n]
_LONGEST = 2**40  # tokens, more than any example has


class Denoiser(NamedTuple):
    """One way to mask spans of a text."""

    density: float  # fraction of the tokens that is masked
    mean_span_length: float | None  # mean length of a masked span; None masks one span, the end of the text
    mode: str = ""  # text before the inputs (UL2's mode token), or empty


# The mixture of denoisers of arXiv 2205.05131, equally likely: regular, sequential and extreme ones.
UL2 = (
    Denoiser(0.15, 3.0, "[NLU]"),
    Denoiser(0.15, 8.0, "[NLU]"),
    Denoiser(0.25, None, "[S2S]"),
    Denoiser(0.5, 3.0, "[NLG]"),
    Denoiser(0.5, 8.0, "[NLG]"),
    Denoiser(0.15, 64.0, "[NLG]"),
    Denoiser(0.5, 64.0, "[NLG]"),
)


class Pairs(NamedTuple):
    """Examples of different lengths, each side joined into one array, so that no step loops over examples."""

    inputs: Tokens
    input_lengths: np.ndarray
    targets: Tokens
    target_lengths: np.ndarray


class Noise(NamedTuple):
    """How many tokens of a text are masked, and in how many spans."""

    tokens: int
    spans: int


class Lengths(NamedTuple):
    """Tokens of one example: of its text, and of the encoder and decoder with their ends."""

    raw: int
    inputs: int
    targets: int


def noise_of(length: int, denoiser: Denoiser) -> Noise:
    """How many tokens and spans of a text of `length` are masked.

    round(length * density) tokens, at least one masked and one kept; round(tokens / mean) spans, at least one. The
    number of spans has a limit, since spans and the text between two are never empty. Source: random_spans_noise_mask
    of google-research/text-to-text-transfer-transformer, which fails at that limit.
    """
    if length < 2:
        return Noise(0, 0)
    tokens = min(max(round(length * denoiser.density), 1), length - 1)
    if denoiser.mean_span_length is None:
        return Noise(tokens, 1)
    spans = max(round(tokens / denoiser.mean_span_length), 1)
    return Noise(tokens, min(spans, tokens, length - tokens))


def lengths_of(raw: int, denoiser: Denoiser) -> Lengths:
    """Lengths of the example made of `raw` tokens: a sentinel stands for each span on both sides, then the end."""
    tokens, spans = noise_of(raw, denoiser)
    # A single token is not masked; its targets still have a sentinel, as in T5's code.
    return Lengths(raw, raw - tokens + spans + 1, tokens + (spans if raw != 1 else 1) + 1)


def solve_lengths(denoiser: Denoiser, *, inputs: int, targets: int | None = None) -> Lengths:
    """The longest example whose inputs (and targets, where given) fit; DataError when not even two tokens fit.

    At density 0.5, both sides have one token less when the targets would be longer than the inputs. Source:
    random_spans_helper of google-research/text-to-text-transfer-transformer; (512, 0.15, 3.0) gives 568, 512, 114.
    """

    def fits(raw: int) -> bool:
        made = lengths_of(raw, denoiser)
        return made.inputs <= inputs and (targets is None or made.targets <= targets)

    if not fits(2):
        room = f"{inputs} inputs" + ("" if targets is None else f" and {targets} targets")
        raise DataError(f"no example of {denoiser} fits into {room}; raise data.sequence_length or target_length")
    longest = bisect.bisect_left(range(_LONGEST), True, lo=3, key=lambda raw: not fits(raw)) - 1
    found = lengths_of(longest, denoiser)
    if denoiser.density == 0.5 and found.targets > found.inputs and longest > 2:
        return lengths_of(longest - 1, denoiser)._replace(targets=found.targets - 1)
    return found


def row_lengths(config: DataConfig) -> tuple[int, int]:
    """Tokens of a row: of the encoder (or the decoder-only model), and of the decoder (or 0)."""
    if config.objective == "causal":
        return config.sequence_length, 0
    if config.target_length is not None:
        return config.sequence_length, config.target_length
    denoiser = Denoiser(config.noise_density, config.mean_span_length)
    return config.sequence_length, solve_lengths(denoiser, inputs=config.sequence_length).targets


def fills_rows(config: DataConfig) -> bool:
    """Whether one example fills a row: span corruption of as much text as fits."""
    return config.objective == "span_corruption" and config.example_length is None


def compositions(rng: np.random.Generator, rows: int, items: int, parts: int) -> np.ndarray:
    """`items` split into `parts` non-empty parts, [rows, parts]: every such split is equally likely.

    A split is a choice of parts - 1 of the items - 1 gaps: those with the smallest random keys. The lowest bits of a
    key are the gap's number.
    """
    gaps = items - 1
    cuts = np.empty((rows, 0), np.int64)
    if parts > 1:
        number = np.uint64((1 << gaps.bit_length()) - 1)
        keys = rng.integers(0, 2**64, size=(rows, gaps), dtype=np.uint64)
        keys &= ~number
        keys |= np.arange(gaps, dtype=np.uint64)
        keys.partition(parts - 2, axis=1)
        cuts = (keys[:, : parts - 1] & number).astype(np.int64) + 1
        cuts.sort(axis=1)
    return np.diff(cuts, axis=1, prepend=0, append=items)


def noise_mask(rng: np.random.Generator, rows: int, length: int, denoiser: Denoiser) -> np.ndarray:
    """Which tokens are masked, bool [rows, length]: kept and masked runs alternate, a kept one is first."""
    tokens, spans = noise_of(length, denoiser)
    if spans == 0:
        return np.zeros((rows, length), bool)
    runs = np.empty((rows, spans, 2), np.int64)
    runs[:, :, 0] = compositions(rng, rows, length - tokens, spans)
    runs[:, :, 1] = compositions(rng, rows, tokens, spans)
    return np.repeat(np.tile([False, True], rows * spans), runs.ravel()).reshape(rows, length)


def span_corruption(
    rng: np.random.Generator, tokens: Tokens, denoiser: Denoiser, *, sentinels: Tokens, eos_id: int
) -> tuple[Tokens, Tokens]:
    """Inputs with a sentinel for each masked span, targets with a sentinel before each; [rows, n] each.

    The text ends with a masked span, so targets have no closing sentinel. DataError for more spans than sentinels.
    Source: arXiv 1910.10683 section 3.1.4.
    """
    rows, length = tokens.shape
    needed = max(noise_of(length, denoiser).spans, 1)
    if needed > len(sentinels):
        raise DataError(
            f"{length} tokens get {needed} masked spans, the tokenizer has {len(sentinels)} sentinels; raise "
            f"data.mean_span_length, lower noise_density or data.example_length, or use another tokenizer"
        )
    mask = noise_mask(rng, rows, length, denoiser)
    inputs = _mark_runs(tokens, mask, sentinels, eos_id)
    return inputs, _mark_runs(tokens, ~mask, sentinels, eos_id)


def _mark_runs(tokens: Tokens, mask: np.ndarray, sentinels: Tokens, eos_id: int) -> Tokens:
    """Each run of the mask becomes one sentinel, counted from the left; all rows have the same number of runs."""
    rows, length = tokens.shape
    if length == 0:
        return np.full((rows, 1), eos_id, np.int32)
    first = mask.copy()
    first[:, 1:] &= ~mask[:, :-1]
    marked = np.array(tokens, np.int32)
    starts = np.flatnonzero(first)
    marked.ravel()[starts] = np.tile(sentinels[: len(starts) // rows], rows)
    kept = marked[first | ~mask].reshape(rows, -1)
    out = np.full((rows, kept.shape[1] + 1), eos_id, np.int32)
    out[:, :-1] = kept
    return out


def fill_spans(inputs: Tokens, targets: Tokens, *, sentinels: Tokens, eos_id: int) -> Tokens:
    """The text of one example, [n]: the exact inverse of `span_corruption`, also for targets that a model wrote.

    Each sentinel of the inputs is replaced by the tokens after it in the targets, if it is there.
    """
    filling = after_sentinels(before_end(targets, eos_id), sentinels)
    found = [inputs[:0]]
    for part in cut_at_sentinels(before_end(inputs, eos_id), sentinels):
        found += [filling.get(int(part[0]), part[:0]), part[1:]] if part[0] in sentinels else [part]
    return np.concatenate(found).astype(np.int32)


def cut_at_sentinels(tokens: Tokens, sentinels: Tokens) -> list[Tokens]:
    """The tokens in parts, of which all but the first begin with a sentinel; none is empty."""
    parts = np.split(tokens, np.flatnonzero(np.isin(tokens, sentinels)))
    return [part for part in parts if len(part)]


def after_sentinels(tokens: Tokens, sentinels: Tokens) -> dict[int, Tokens]:
    """By sentinel, the tokens from the first such sentinel to the next sentinel."""
    found: dict[int, Tokens] = {}
    for part in cut_at_sentinels(tokens, sentinels):
        if part[0] in sentinels:
            found.setdefault(int(part[0]), part[1:])
    return found


def before_end(tokens: Tokens, eos_id: int) -> Tokens:
    """Tokens without the end that an example closes with."""
    return tokens[:-1] if len(tokens) and tokens[-1] == eos_id else tokens


def denoise(
    rng: np.random.Generator,
    tokens: Tokens,
    denoisers: Sequence[Denoiser],
    *,
    raw: Sequence[int],
    modes: Sequence[Tokens],
    sentinels: Tokens,
    eos_id: int,
) -> Pairs:
    """A stretch of text, [n], cut into examples, each for a denoiser drawn with equal chances.

    `raw` has the tokens of an example of each denoiser, `modes` the ids before its inputs. The text has at least one
    token; the last example may be shorter than the others.
    """
    kinds = rng.integers(len(denoisers), size=len(tokens) // min(raw) + 1)
    ends = np.cumsum(np.asarray(raw)[kinds])
    count = int(np.searchsorted(ends, len(tokens))) + 1
    kinds, ends = kinds[:count], np.minimum(ends[:count], len(tokens))
    lengths = np.diff(ends, prepend=0)
    parts = []
    for kind, length in sorted(set(zip(kinds.tolist(), lengths.tolist(), strict=True))):
        starts = (ends - lengths)[(kinds == kind) & (lengths == length)]
        pieces = tokens[starts[:, None] + np.arange(length)]
        inputs, targets = span_corruption(rng, pieces, denoisers[kind], sentinels=sentinels, eos_id=eos_id)
        mode = np.broadcast_to(modes[kind].astype(np.int32), (len(starts), len(modes[kind])))
        parts.append((np.concatenate([mode, inputs], axis=1), targets))
    fields = []
    for blocks in zip(*parts, strict=True):
        fields.append(np.concatenate([block.ravel() for block in blocks]))
        fields.append(np.concatenate([np.full(block.shape[0], block.shape[1]) for block in blocks]))
    return Pairs(*fields)


def prefix_lm(rng: np.random.Generator, tokens: Tokens, *, eos_id: int) -> Pairs:
    """Each text of [rows, n] cut at a uniformly drawn place: its beginning as inputs, the rest as targets.

    A single token is an input. Source: arXiv 1910.10683 section 3.2.3.
    """
    rows, length = tokens.shape
    cut = rng.integers(1, length, size=(rows, 1)) if length > 1 else np.full((rows, 1), length)
    place = np.arange(length + 1)
    closed = np.full((rows, length + 1), eos_id, np.int32)
    closed[:, :-1] = tokens
    targets = closed[place >= cut]
    np.put_along_axis(closed, cut, eos_id, axis=1)
    return Pairs(closed[place <= cut], cut[:, 0] + 1, targets, length + 1 - cut[:, 0])


def join_prefix(inputs: Tokens, targets: Tokens, *, eos_id: int) -> Tokens:
    """The text of one example: the inverse of `prefix_lm`."""
    return np.concatenate([before_end(inputs, eos_id), before_end(targets, eos_id)])


def causal(tokens: Tokens, *, eos_id: int) -> tuple[Tokens, Tokens]:
    """Next-token prediction of one document: (end, t1..tn) -> (t1..tn, end); `targets[:-1]` is its inverse."""
    end = np.array([eos_id], np.int32)
    return np.concatenate([end, tokens]), np.concatenate([tokens, end])
