"""Examples of an encoder-decoder in rows of two fixed lengths: packed with segment ids on both sides, or one a row.

A packed row holds as many whole examples as fit on both sides. Segment ids count from 1; 0 is padding. Inputs and
targets of one example have the same id, so that one comparison masks self- and cross-attention. Positions are not
needed, since T5's are relative. Where one example fills a row, its length replaces the ids, which would cost a GPU's
fused attention wider heads.
"""

import numpy as np

from jaxllm.data import DataError
from jaxllm.data.objectives import Pairs

Batch = dict[str, np.ndarray]


def pack_pairs(pairs: Pairs, *, inputs_length: int, targets_length: int, start_id: int, alone: bool = False) -> Batch:
    """Rows [n, inputs_length] and [n, targets_length] that hold every example once.

    Decoder tokens are the targets shifted right inside each example, after `start_id`. `alone` gives each example a
    row, and `encoder_lengths` [n] in place of segment ids. An example that is longer than a row is a DataError.
    """
    sizes = np.stack([pairs.input_lengths, pairs.target_lengths], axis=1)
    room = np.array([inputs_length, targets_length])
    if (sizes > room).any():
        longest = sizes.max(axis=0)
        raise DataError(
            f"an example of {longest[0]} inputs or {longest[1]} targets does not fit a row of {inputs_length} and "
            f"{targets_length}; raise data.sequence_length or data.target_length"
        )
    row = np.argsort(_largest_first(sizes, room)) if alone else first_fit(sizes, room)
    segment, offsets = _slots(row, sizes)
    count = int(row.max(initial=-1)) + 1
    shifted = np.roll(pairs.targets, 1)
    shifted[np.cumsum(pairs.target_lengths) - pairs.target_lengths] = start_id
    source = _places(row * inputs_length + offsets[:, 0], pairs.input_lengths)
    target = _places(row * targets_length + offsets[:, 1], pairs.target_lengths)

    def spread(place: np.ndarray, width: int, values: np.ndarray, dtype: type = np.int32) -> np.ndarray:
        out = np.zeros(count * width, dtype)
        out[place] = values
        return out.reshape(count, width)

    rows = {
        "encoder_tokens": spread(source, inputs_length, pairs.inputs),
        "decoder_tokens": spread(target, targets_length, shifted),
        "targets": spread(target, targets_length, pairs.targets),
        "weights": spread(target, targets_length, np.ones(1, np.float32), np.float32),
    }
    if alone:
        return {**rows, "encoder_lengths": pairs.input_lengths[np.argsort(row)].astype(np.int32)}
    return {
        **rows,
        "encoder_segment_ids": spread(source, inputs_length, np.repeat(segment, pairs.input_lengths)),
        "decoder_segment_ids": spread(target, targets_length, np.repeat(segment, pairs.target_lengths)),
    }


def unpack_pairs(batch: Batch) -> list[tuple[np.ndarray, np.ndarray]]:
    """Inputs and targets of every example of packed rows, row by row: the inverse of `pack_pairs`, up to the order.

    For decoder-only rows, tokens and targets of every document, or of the row where documents attend to each other.
    """
    found = []
    tokens = batch["encoder_tokens"] if "encoder_tokens" in batch else batch["tokens"]
    for row, (left, right) in enumerate(zip(*segments_of(batch), strict=True)):
        segments = range(1, left.max(initial=0) + 1)
        found += [(tokens[row][left == segment], batch["targets"][row][right == segment]) for segment in segments]
    return found


def segments_of(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids of the inputs and of the targets; a decoder-only model has one for both."""
    if "encoder_segment_ids" in batch:
        return batch["encoder_segment_ids"], batch["decoder_segment_ids"]
    real = (batch["weights"] > 0).astype(np.int32)
    if "encoder_lengths" in batch:
        columns = np.arange(batch["encoder_tokens"].shape[1])
        return (columns < batch["encoder_lengths"][:, None]).astype(np.int32), real
    ids = batch.get("segment_ids", real)
    return ids, ids


def first_fit(sizes: np.ndarray, room: np.ndarray) -> np.ndarray:
    """The row of each example, [n]: the largest is placed first, each into the first row with room on both sides."""
    rows = np.zeros(len(sizes), np.int64)
    free = np.tile(room, (len(sizes), 1))
    used = 0
    for i in _largest_first(sizes, room):
        fits = (free[:used] >= sizes[i]).all(axis=1)
        rows[i] = fits.argmax() if fits.any() else used
        used = max(used, rows[i] + 1)
        free[rows[i]] -= sizes[i]
    return rows


def _largest_first(sizes: np.ndarray, room: np.ndarray) -> np.ndarray:
    return np.argsort(-(sizes / room).max(axis=1), kind="stable")


def _slots(row: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of each example in its row, from 1, and where it begins on both sides."""
    order = np.argsort(row, kind="stable")
    first = np.searchsorted(row[order], row[order])  # where the row of each begins, in this order
    before = np.cumsum(sizes[order], axis=0) - sizes[order]
    segment, offsets = np.empty(len(row), np.int32), np.empty_like(sizes)
    segment[order] = np.arange(len(row)) - first + 1
    offsets[order] = before - before[first]
    return segment, offsets


def _places(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts[i], starts[i] + 1, ... for each i, `lengths[i]` of them, joined."""
    begin = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - begin, lengths)
