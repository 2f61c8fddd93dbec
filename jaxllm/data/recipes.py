"""One `Recipe` per objective: how documents are encoded, cut and masked, and which arrays a row holds.

A decoder row is (tokens, positions, segment_ids, targets, weights); an encoder-decoder row is that of `pack_pairs`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxllm.config import DataConfig
from jaxllm.data import DataError, objectives
from jaxllm.data.objectives import Denoiser, Lengths, Pairs, fills_rows, row_lengths
from jaxllm.data.packing import Batch, pack_pairs
from jaxllm.data.records import field
from jaxllm.data.tokenizer import Tokenizer

# Examples in a stretch of text that is cut, masked and packed at once: enough to pack well and to vectorise over.
_EXAMPLES_AT_ONCE = 64


class Recipe(NamedTuple):
    """How an objective turns documents into rows."""

    encode: Callable[[dict[str, Any]], Batch]  # record -> arrays of one document
    cut: dict[str, int] | None  # length at which joined documents are cut, by array; None for groups of whole documents
    # one such cut (or list of documents) and a generator -> rows, arrays [n, ...]
    expand: Callable[[Any, np.random.Generator], Batch]
    restore: Callable[[np.ndarray, np.ndarray], np.ndarray]  # inputs and targets of one example -> its text as tokens
    lengths: tuple[int, int]  # tokens of a row: of the encoder (or the decoder-only model), and of the decoder (or 0)


Fields = dict[str, tuple[tuple[int, ...], type]]


def decoder_fields(config: DataConfig) -> Fields:
    """Arrays of a row of a decoder-only objective."""
    row = (config.sequence_length,)
    names = ("tokens", "targets", "positions", *(["segment_ids"] if config.document_mask else []))
    return {**{name: (row, np.int32) for name in names}, "weights": (row, np.float32)}


def pair_fields(config: DataConfig) -> Fields:
    """Arrays of a row of an encoder-decoder objective, see `pack_pairs`."""
    length, targets = ((size,) for size in row_lengths(config))
    fields: Fields = {"encoder_tokens": (length, np.int32), "decoder_tokens": (targets, np.int32)}
    fields |= {"targets": (targets, np.int32), "weights": (targets, np.float32)}
    if fills_rows(config):
        return {**fields, "encoder_lengths": ((), np.int32)}
    return {**fields, "encoder_segment_ids": (length, np.int32), "decoder_segment_ids": (targets, np.int32)}


def causal_recipe(config: DataConfig, tokenizer: Tokenizer, start_id: int) -> Recipe:
    """Next-token prediction: each document is (end, t1..tn) -> (t1..tn, end), so nothing crosses documents."""

    def encode(record: dict[str, Any]) -> Batch:
        tokens, targets = objectives.causal(tokenizer.encode(field(record, config.text_key)), eos_id=tokenizer.eos_id)
        return {"tokens": tokens, "targets": targets}

    length = config.sequence_length

    def expand(packed: Batch, _: np.random.Generator) -> Batch:
        packed = {name: value.reshape(-1, length) for name, value in packed.items()}
        packed = {name: value[packed["tokens_segment_ids"][:, 0] > 0] for name, value in packed.items()}
        segments, positions = packed["tokens_segment_ids"], packed["tokens_positions"]
        inside = segments > 0
        row = {"tokens": packed["tokens"], "targets": packed["targets"], "weights": inside.astype(np.float32)}
        if not config.document_mask:
            # The row is one text; padding is at its end, so the causal mask is enough.
            whole = np.broadcast_to(np.arange(length, dtype=np.int32), segments.shape).copy()
            return {**row, "positions": whole}
        # In each row, the first document is number 1 and begins at position 0.
        began = np.where(segments == segments[:, :1], positions[:, :1], 0)
        row["positions"] = np.where(inside, positions - began, 0)
        row["segment_ids"] = np.where(inside, segments - segments[:, :1] + 1, 0)
        return row

    def restore(_: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return targets[targets != tokenizer.eos_id]

    cut = _EXAMPLES_AT_ONCE * length
    return Recipe(encode, {"tokens": cut, "targets": cut}, expand, restore, (length, 0))


def span_corruption_recipe(config: DataConfig, tokenizer: Tokenizer, start_id: int) -> Recipe:
    """T5's objective: documents are joined without a mark between them, as in T5's code."""
    denoiser = Denoiser(config.noise_density, config.mean_span_length)
    return _denoising(config, tokenizer, start_id, (denoiser,))


def ul2_recipe(config: DataConfig, tokenizer: Tokenizer, start_id: int) -> Recipe:
    """UL2's mixture of seven denoisers; the mode is text before the inputs, as in its released checkpoints."""
    return _denoising(config, tokenizer, start_id, objectives.UL2)


def _denoising(config: DataConfig, tokenizer: Tokenizer, start_id: int, denoisers: Sequence[Denoiser]) -> Recipe:
    sentinels, eos = tokenizer.sentinel_ids, tokenizer.eos_id
    modes = [tokenizer.encode(each.mode) for each in denoisers]
    made = [_example_lengths(config, each, len(mode)) for each, mode in zip(denoisers, modes, strict=True)]
    needed = max(objectives.noise_of(lengths.raw, each).spans for lengths, each in zip(made, denoisers, strict=True))
    if needed > len(sentinels):
        raise DataError(
            f"objective {config.objective} masks up to {needed} spans in an example, the tokenizer has "
            f"{len(sentinels)} sentinels (<extra_id_0> and on); use a tokenizer with more, lower data.example_length "
            f"or data.noise_density, or raise data.mean_span_length"
        )
    raw = [lengths.raw for lengths in made]
    rows = row_lengths(config)
    by_mode = sorted((mode for mode in modes if len(mode)), key=len, reverse=True)

    def encode(record: dict[str, Any]) -> Batch:
        tokens = tokenizer.encode(field(record, config.text_key))
        found = np.isin(tokens, sentinels)
        if found.any():
            raise DataError(
                f"the tokenizer reads {tokenizer.decode(tokens[found][:1])!r} in a document as a sentinel, so masked "
                f"spans would be ambiguous; mark it as a special token in tokenizer.json"
            )
        return {"tokens": tokens}

    def expand(piece: Batch, rng: np.random.Generator) -> Batch:
        text = piece["tokens"][piece["tokens_segment_ids"] > 0]
        pairs = objectives.denoise(rng, text, denoisers, raw=raw, modes=modes, sentinels=sentinels, eos_id=eos)
        alone = fills_rows(config)
        return pack_pairs(pairs, inputs_length=rows[0], targets_length=rows[1], start_id=start_id, alone=alone)

    def restore(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
        mode = next((mode for mode in by_mode if np.array_equal(inputs[: len(mode)], mode)), inputs[:0])
        return objectives.fill_spans(inputs[len(mode) :], targets, sentinels=sentinels, eos_id=eos)

    return Recipe(encode, {"tokens": _EXAMPLES_AT_ONCE * max(raw)}, expand, restore, rows)


def _example_lengths(config: DataConfig, denoiser: Denoiser, mode_length: int) -> Lengths:
    """The longest example of a denoiser that fits a row and `data.example_length`."""
    inputs = config.sequence_length - mode_length
    best = objectives.solve_lengths(denoiser, inputs=inputs, targets=config.target_length)
    if fills_rows(config):
        exact = objectives.solve_lengths(denoiser, inputs=inputs)
        if config.target_length is not None and config.target_length < exact.targets:
            raise DataError(
                f"span corruption of {exact.raw} tokens makes {exact.inputs} inputs and {exact.targets} targets, "
                f"data.target_length is {config.target_length}; set it to {exact.targets} or null, or set "
                f"data.example_length to {best.raw} for shorter examples"
            )
    return best if config.example_length is None else best._replace(raw=min(best.raw, config.example_length))


def prefix_lm_recipe(config: DataConfig, tokenizer: Tokenizer, start_id: int) -> Recipe:
    """The beginning of a stretch of text as inputs and the rest as targets, cut at a uniformly drawn place."""
    eos = tokenizer.eos_id
    rows = row_lengths(config)
    raw = min(*rows, config.example_length or rows[0])

    def encode(record: dict[str, Any]) -> Batch:
        return {"tokens": tokenizer.encode(field(record, config.text_key))}

    def expand(piece: Batch, rng: np.random.Generator) -> Batch:
        text = piece["tokens"][piece["tokens_segment_ids"] > 0]
        whole = len(text) // raw * raw
        pieces = [text[:whole].reshape(-1, raw), text[None, whole:]]
        pairs = [objectives.prefix_lm(rng, piece, eos_id=eos) for piece in pieces if piece.size]
        joined = Pairs(*(np.concatenate(parts) for parts in zip(*pairs, strict=True)))
        return pack_pairs(joined, inputs_length=rows[0], targets_length=rows[1], start_id=start_id)

    restore = functools.partial(objectives.join_prefix, eos_id=eos)
    return Recipe(encode, {"tokens": _EXAMPLES_AT_ONCE * raw}, expand, restore, rows)


def seq2seq_recipe(config: DataConfig, tokenizer: Tokenizer, start_id: int) -> Recipe:
    """Pairs of the fields text_key and target_key; each ends in the end token."""
    target_key = config.target_key
    if target_key is None:
        raise DataError("objective seq2seq needs data.target_key, the field that holds the answer")
    keys = {"inputs": config.text_key, "targets": target_key}
    rows = row_lengths(config)
    room = dict(zip(keys, rows, strict=True))
    end = np.array([tokenizer.eos_id], np.int32)

    def encode(record: dict[str, Any]) -> Batch:
        document = {side: tokenizer.encode(field(record, key)) for side, key in keys.items()}
        for side, tokens in document.items():
            if len(tokens) >= room[side] and config.too_long == "stop":
                length = "sequence_length" if side == "inputs" else "target_length"
                raise DataError(
                    f"the {keys[side]!r} of a pair has {len(tokens)} tokens and an end, data.{length} is {room[side]} "
                    f"({tokenizer.decode(tokens[:12])!r}...); raise it, or set data.too_long=truncate"
                )
            document[side] = np.concatenate([tokens[: room[side] - 1], end])
        return document

    def expand(documents: list[Batch], _: np.random.Generator) -> Batch:
        sides = []
        for side in keys:
            sides.append(np.concatenate([document[side] for document in documents]))
            sides.append(np.array([len(document[side]) for document in documents]))
        return pack_pairs(Pairs(*sides), inputs_length=rows[0], targets_length=rows[1], start_id=start_id)

    restore = functools.partial(objectives.join_prefix, eos_id=tokenizer.eos_id)
    return Recipe(encode, None, expand, restore, rows)


class Objective(NamedTuple):
    """One row of `RECIPES`."""

    recipe: Callable[[DataConfig, Tokenizer, int], Recipe]  # (config, tokenizer, first decoder token) -> `Recipe`
    fields: Callable[[DataConfig], Fields]  # arrays of a batch by name, each as its shape in a row and its dtype


RECIPES = {
    "causal": Objective(causal_recipe, decoder_fields),
    "span_corruption": Objective(span_corruption_recipe, pair_fields),
    "ul2": Objective(ul2_recipe, pair_fields),
    "prefix_lm": Objective(prefix_lm_recipe, pair_fields),
    "seq2seq": Objective(seq2seq_recipe, pair_fields),
}
