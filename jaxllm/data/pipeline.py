"""Batches of a run as an iterator whose whole state is a small JSON object.

documents -> shuffle, repeat (grain, seeded) -> tokenise -> pack into rows -> shuffle rows in a window -> batch ->
objective. A batch is a pure function of (config, seed, step, process), so that a resumed run sees what an
uninterrupted one would have. What an objective does is in one `Recipe`; the pipeline knows none of them.
"""

from __future__ import annotations

import logging
import lzma
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags
from grain.experimental import ConcatThenSplitIterDataset, WindowShuffleIterDataset

from jaxllm.config import DataConfig
from jaxllm.data import DataError
from jaxllm.data.sources import Source, field, open_source, texts
from jaxllm.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

_log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]

# Rows of one document follow each other out of packing; a batch should mix documents.
_SHUFFLE_WINDOW = 4096


class Recipe(NamedTuple):
    """How an objective turns documents into batches.

    Attributes:
        encode: record -> arrays of one document.
        lengths: row length of each of those arrays.
        finish: packed batch and generator -> the batch that the model's loss expects.
    """

    encode: Callable[[dict[str, Any]], Batch]
    lengths: dict[str, int]
    finish: Callable[[Batch, np.random.Generator], Batch]


def causal_recipe(config: DataConfig, tokenizer: Tokenizer) -> Recipe:
    """Next-token prediction: each document is (end, t1..tn) -> (t1..tn, end), so nothing crosses documents."""

    def encode(record: dict[str, Any]) -> Batch:
        ids = tokenizer.encode(field(record, config.text_key))
        end = np.array([tokenizer.eos_id], np.int32)
        return {"tokens": np.concatenate([end, ids]), "targets": np.concatenate([ids, end])}

    def finish(packed: Batch, rng: np.random.Generator) -> Batch:
        del rng
        segments = packed["tokens_segment_ids"]
        return {
            "tokens": packed["tokens"],
            "targets": packed["targets"],
            "positions": packed["tokens_positions"],
            "segment_ids": segments,
            "weights": (segments > 0).astype(np.float32),
        }

    return Recipe(encode, {"tokens": config.sequence_length, "targets": config.sequence_length}, finish)


RECIPES: dict[str, Callable[[DataConfig, Tokenizer], Recipe]] = {"causal": causal_recipe}


class Pipeline:
    """Training batches (iterate it), validation batches, and what they are made of.

    Attributes:
        tokenizer: text to ids and back.
        source_name: corpus and version.
    """

    def __init__(
        self,
        config: DataConfig,
        source: Source,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        seed: int,
        shard: slice,
    ) -> None:
        """Opens the training iterator; see `build_pipeline`."""
        self.tokenizer, self.source_name = tokenizer, source.name
        self._config, self._source, self._batch_size = config, source, batch_size
        self._recipe = RECIPES[config.objective](config, tokenizer)
        self._identity = {
            "source": source.name,
            "tokenizer": tokenizer.fingerprint,
            "workers": config.workers,
            "shard": f"{shard.start}/{shard.step}",
        }
        documents = grain.MapDataset.source(source.train)[shard].seed(seed).shuffle().repeat()
        rows = self._rows(documents.map(self._recipe.encode))
        rows = WindowShuffleIterDataset(rows, window_size=_SHUFFLE_WINDOW, seed=seed)
        batches = rows.batch(batch_size, drop_remainder=True).seed(seed).random_map(self._recipe.finish)
        if config.workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.workers))
        self._iterator = iter(batches)

    def __iter__(self) -> Pipeline:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """JSON-able position in the data."""
        return {**self._identity, "iterator": self._iterator.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that `get_state` gave.

        Raises:
            DataError: when it belongs to other data, another tokenizer or another number of workers.
        """
        for key, value in self._identity.items():
            if state.get(key) != value:
                raise DataError(
                    f"the checkpoint was made with {key} {state.get(key)!r}, this run has {value!r}; resume with the "
                    f"same or start another training.run_dir"
                )
        self._iterator.set_state(_restore_tuples(state["iterator"]))

    def validation(self, count: int) -> Iterator[Batch]:
        """The first `count` validation batches, the same ones every time; the last one may hold padding rows."""
        # Shuffled with a fixed seed, so that the first batches already come from many documents.
        documents = grain.MapDataset.source(self._source.validation).seed(0).shuffle().map(self._recipe.encode)
        rows = WindowShuffleIterDataset(self._rows(documents), window_size=_SHUFFLE_WINDOW, seed=0)
        batches = rows.batch(self._batch_size, drop_remainder=False)
        for index, packed in zip(range(count), batches, strict=False):
            padded = {name: _pad_rows(value, self._batch_size) for name, value in packed.items()}
            yield self._recipe.finish(padded, np.random.default_rng(index))

    def baselines(self) -> dict[str, float]:
        """Bits per byte of the validation text under two models that know no order, or no other text.

        unigram: each token at its add-one frequency in a sample of the training text; lzma: each document
        compressed alone by xz at its strongest preset.
        """
        counts = np.ones(self.tokenizer.vocab_size)
        for text in _sample(self._source.train, self._config.text_key):
            counts += np.bincount(self.tokenizer.encode(text), minlength=len(counts))
        surprise = -np.log2(counts / counts.sum())
        bits = size = packed = 0.0
        for text in _sample(self._source.validation, self._config.text_key):
            data = text.encode()
            bits += float(surprise[self.tokenizer.encode(text)].sum())
            packed += 8 * len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=_XZ))
            size += len(data)
        return {"unigram": bits / max(size, 1), "lzma": packed / max(size, 1)}

    def close(self) -> None:
        """Stops worker processes."""
        close = getattr(self._iterator, "close", None)
        if close is not None:
            close()

    def _rows(self, documents: Any) -> Any:
        return ConcatThenSplitIterDataset(documents.to_iter_dataset(), length_struct=self._recipe.lengths)


_XZ = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
_SAMPLE_DOCUMENTS = 400


def build_pipeline(
    config: DataConfig,
    *,
    vocab_size: int,
    batch_size: int,
    seed: int,
    run_dir: Path,
    process_index: int = 0,
    process_count: int = 1,
) -> Pipeline:
    """Opens the corpus and the tokenizer of a run.

    Args:
        config: source, tokenizer, objective and lengths.
        vocab_size: rows of the model's embedding.
        batch_size: rows of a batch of this process.
        seed: of the order.
        run_dir: where the tokenizer, and unless `cache_dir` is set the prepared data, are kept.
        process_index: which part of the documents this process reads.
        process_count: of how many parts.

    Raises:
        DataError: naming what is missing or does not fit, and the fix.
    """
    if config.objective not in RECIPES:
        raise DataError(f"data.objective {config.objective!r} is not built yet; known: {', '.join(RECIPES)}")
    source = open_source(config, cache_dir=Path(config.cache_dir or run_dir / "data").expanduser())
    tokenizer = _tokenizer(config, source, vocab_size, run_dir)
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} ids, model.vocab_size is {vocab_size}; raise it to at least "
            f"{tokenizer.vocab_size}"
        )
    shard = slice(process_index, None, process_count)
    return Pipeline(config, source, tokenizer, batch_size=batch_size, seed=seed, shard=shard)


def _tokenizer(config: DataConfig, source: Source, vocab_size: int, run_dir: Path) -> Tokenizer:
    if config.tokenizer != "train":
        return load_tokenizer(config.tokenizer)
    cached = run_dir / "tokenizer.json"
    if cached.exists():
        return load_tokenizer(cached)
    tokenizer = train_tokenizer(texts(source.train, config.text_key), vocab_size=vocab_size)
    tokenizer.save(cached)
    _log.info("trained a tokenizer of %d ids on %d documents", tokenizer.vocab_size, len(source.train))
    return tokenizer


def _sample(records: Sequence[Any], key: str) -> Iterator[str]:
    stride = max(math.ceil(len(records) / _SAMPLE_DOCUMENTS), 1)
    for i in range(0, len(records), stride):
        yield field(records[i], key)


def _restore_tuples(state: Any) -> Any:
    """Undoes what JSON did to grain's packing state: a slice is compared as a tuple there, a list never equals it."""
    if isinstance(state, list):
        return [_restore_tuples(item) for item in state]
    if not isinstance(state, dict):
        return state
    restored = {name: _restore_tuples(value) for name, value in state.items()}
    if "remainder_slices" in restored:
        restored["remainder_slices"] = {name: tuple(cut) for name, cut in restored["remainder_slices"].items()}
    return restored


def _pad_rows(value: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(value, [(0, rows - len(value)), *[(0, 0)] * (value.ndim - 1)])
