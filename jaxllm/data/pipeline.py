"""Batches of a run as an iterator whose whole state is a small JSON object.

documents -> shuffle, repeat (grain, seeded) -> tokenise -> join and cut -> mask, pack into rows -> shuffle rows in a
window -> batch. A batch is a pure function of (config, seed, step), so a resumed run gets the batches of an
uninterrupted one: random keys come from the seed and the number of the cut, which no epoch repeats. Worker processes
tokenise and change no batch, see `jaxllm.data.workers`.
"""

import lzma
import math
import os
import sys
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from grain import experimental

from jaxllm.config import DataConfig
from jaxllm.data import BatchError, DataError
from jaxllm.data.packing import Batch
from jaxllm.data.recipes import RECIPES, Objective
from jaxllm.data.records import field, is_stream, sample_texts
from jaxllm.data.sources import Source
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.data.workers import EncodedDocuments, EncodedStream, Task

# Rows and tokens that are shuffled together, so that a batch mixes documents. They are all read before the first batch,
# and again on resume.
_WINDOW_ROWS, _WINDOW_TOKENS = 4096, 2**20
# grain's own 16 threads and 500 documents cost more in bookkeeping than they read ahead.
_READING = grain.ReadOptions(num_threads=min(4, os.cpu_count() or 1), prefetch_buffer_size=32)
_BYTES_PER_TOKEN = 4  # of the text that workers encode early: about a window, which is read at once
_LONGEST = 2**20  # characters of a document for a baseline; xz compresses a megabyte a second
_GROUP = 256  # documents that are packed together where they are not cut


class _Rows(experimental.FlatMapTransform):
    """Splits arrays [n, ...] into n rows."""

    max_fan_out = sys.maxsize

    def flat_map(self, element: Batch) -> list[Batch]:
        return [dict(zip(element, row, strict=True)) for row in zip(*element.values(), strict=True)]


class Pipeline:
    """Training batches (iterate it), validation batches, and their tokenizer, corpus and recipe."""

    def __init__(
        self,
        config: DataConfig,
        source: Source,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        seed: int,
        decoder_start_id: int = 0,
        objective: Objective | None = None,
        rows: range | None = None,
    ) -> None:
        """Opens the training iterator.

        `decoder_start_id` is the first decoder token of an example, for an encoder-decoder. `objective` replaces that
        of the config. Training batches have `rows` of each batch, all by default.
        """
        self.tokenizer, self.source_name = tokenizer, source.name
        self._config, self._source, self._batch_size = config, source, batch_size
        objective = objective or RECIPES[config.objective]
        self.recipe = objective.recipe(config, tokenizer, decoder_start_id)
        self.identity = {"source": source.name, "tokenizer": tokenizer.fingerprint, "streams": config.streams}
        # By name, the corpus of each validation set. The first decides which checkpoint is best, so it may not change.
        self.sets = {name: each.name for name, each in source.sets.items()}
        if self.sets:
            self.identity["validation"] = next(iter(self.sets.values()))
        if is_stream(source.train) and config.workers:
            raise DataError(f"data.workers read documents by number, {source.name} is a stream; set data.workers=0")
        records = () if is_stream(source.train) and config.streams == 1 else source.documents("data.streams")
        task = Task((), records, objective, config, tokenizer, decoder_start_id)
        # Stream s makes rows s * size to (s + 1) * size of a batch. Only streams that make some of `rows` are opened.
        size, rows = batch_size // config.streams, rows or range(batch_size)
        opened = range(rows.start // size, math.ceil(rows.stop / size))
        first = opened.start * size
        self._kept = slice(rows.start - first, rows.stop - first)
        workers = math.ceil(config.workers / len(opened))
        datasets = {str(number): self._stream(number, task, seed, workers) for number in opened}
        self._iterators = {name: iter(each.batch(size, drop_remainder=True)) for name, each in datasets.items()}

    def __iter__(self) -> "Pipeline":
        return self

    def __next__(self) -> Batch:
        """The next batch; BatchError when it cannot be made, after which earlier positions stay good."""
        try:
            parts = [next(each) for each in self._iterators.values()]
        except DataError as error:
            raise BatchError(str(error)) from error
        except StopIteration:
            raise BatchError(f"the source {self.source_name} has ended; a stream of records must not") from None
        return {name: np.concatenate([part[name] for part in parts])[self._kept] for name in parts[0]}

    def get_state(self) -> dict[str, Any]:
        """JSON-able position in the data; of several streams, a dictionary of those that are opened here."""
        states = {number: each.get_state() for number, each in self._iterators.items()}
        return {**self.identity, "iterator": states["0"] if self._config.streams == 1 else states}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position of `get_state`; DataError for one of other data, another tokenizer or an old order."""
        if state.get("workers", 0):  # until 2026-11, each worker made its own batches
            fix = "start another training.run_dir, with training.init_from for its parameters"
            raise DataError(f"the order of the checkpoint's data depends on data.workers={state['workers']}; {fix}")
        state = {"streams": 1, **state}
        for key, value in self.identity.items():
            if state.get(key) != value:
                raise DataError(
                    f"the checkpoint was made with {key} {state.get(key)!r}, this run has {value!r}; resume with the "
                    f"same or start another training.run_dir"
                )
        states = {"0": state["iterator"]} if self._config.streams == 1 else state["iterator"]
        for number, each in self._iterators.items():
            each.set_state(_restore_tuples(states[number]))

    def validation(self, count: int, name: str | None = None) -> Iterator[Batch]:
        """The first `count` validation batches, the same ones every time; the last one may hold padding rows.

        They are those of the set `name`; without a name, of the first set or of the held-out documents.
        """
        records = self._source.validation if name is None else self._source.sets[name].documents("validation")
        # A fixed seed, so that the first batches already come from many documents.
        documents = grain.MapDataset.source(records).seed(0).shuffle()
        batches = self._rows(self._encoded(documents), seed=0).batch(self._batch_size, drop_remainder=False)
        for _, batch in zip(range(count), batches, strict=False):
            missing = self._batch_size - len(next(iter(batch.values())))
            yield {key: np.pad(rows, [(0, missing), *[(0, 0)] * (rows.ndim - 1)]) for key, rows in batch.items()}

    def once(self, documents: int) -> Iterator[Batch]:
        """Batches made of the first training documents, each used once; the last may hold fewer rows."""
        chosen = grain.MapDataset.source(self._source.documents("an inspection"))[:documents]
        return iter(self._rows(self._encoded(chosen), seed=0).batch(self._batch_size, drop_remainder=False))

    def tokens(self, documents: int) -> Iterator[np.ndarray]:
        """Tokens of the same documents before the objective; for pairs, of both fields."""
        keys = [key for key in (self._config.text_key, self._config.target_key) if key is not None]
        records = self._source.documents("an inspection")
        for i in range(min(documents, len(records))):
            yield from (self.tokenizer.encode(field(records[i], key)) for key in keys)

    def baselines(self) -> dict[str, float]:
        """See `simple_baselines`; for pairs, of the answers."""
        key = self._config.target_key or self._config.text_key
        return simple_baselines(self._source, self.tokenizer, key)

    def close(self) -> None:
        """Stops worker processes."""
        for each in self._iterators.values():
            each.close()

    def _stream(self, number: int, task: Task, seed: int, workers: int) -> Any:
        """Rows of the documents i with i % data.streams == number, or of the source's own stream."""
        of_rows = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        if is_stream(self._source.train):
            return self._rows(EncodedStream(self._source.train, self.recipe.encode), seed=of_rows)
        records, streams = task.records, self._config.streams
        if len(records) < streams:
            raise DataError(f"data.streams {streams} needs as many documents, {self.source_name} has {len(records)}")
        # Bytes of a sample of documents, each with its end.
        sizes = [len(text.encode()) + 1 for text in sample_texts(records, self._config.text_key)]
        size = sum(sizes) / len(sizes)
        # The most rows that the documents fill once, since no token is shorter than a byte. A larger window would read
        # three short documents again and again, for minutes.
        window = max(self._window(max(math.ceil(len(records) * size / self.recipe.lengths[0]), 1)) // streams, 1)
        order: Any = grain.MapDataset.source(range(number, len(records), streams)).seed(seed).shuffle().repeat()
        if workers:
            ahead = window * self.recipe.lengths[0] * _BYTES_PER_TOKEN
            encoded = EncodedDocuments(task._replace(order=order), workers=workers, size=size, ahead=ahead)
        else:
            encoded = self._encoded(order.map(records.__getitem__))
        return self._rows(encoded, seed=of_rows, window=window)

    def _encoded(self, documents: Any) -> Any:
        return documents.map(self.recipe.encode).to_iter_dataset(_READING)

    def _window(self, rows: int = _WINDOW_ROWS) -> int:
        """How many rows are shuffled together, `rows` at most."""
        window = min(rows, _WINDOW_ROWS, max(_WINDOW_TOKENS // self.recipe.lengths[0], 1))
        if self.recipe.cut is None:  # whole documents are shuffled before; only packing has sorted them
            return min(window, _GROUP)
        return window

    def _rows(self, encoded: Any, *, seed: int, window: int | None = None) -> Any:
        if self.recipe.cut is None:
            cuts = encoded.batch(_GROUP, batch_fn=list)
        else:
            cuts = experimental.ConcatThenSplitIterDataset(encoded, length_struct=self.recipe.cut)
        rows = experimental.FlatMapIterDataset(cuts.seed(seed).random_map(self.recipe.expand), _Rows())
        return experimental.WindowShuffleIterDataset(rows, window_size=window or self._window(), seed=seed)


def _restore_tuples(state: Any) -> Any:
    """Makes tuples of the lists in JSON where grain's packing state has them; a list never equals a tuple."""
    if isinstance(state, list):
        return [_restore_tuples(item) for item in state]
    if not isinstance(state, dict):
        return state
    restored = {name: _restore_tuples(value) for name, value in state.items()}
    if "remainder_slices" in restored:
        restored["remainder_slices"] = {name: tuple(cut) for name, cut in restored["remainder_slices"].items()}
    return restored


def simple_baselines(source: Source, tokenizer: Tokenizer, key: str) -> dict[str, float]:
    """Bits per byte of the field `key` of the validation records under two models that need no training.

    They are estimated from samples of the corpus. The unigram counts of a stream are those of the validation records.

    unigram: each token at its add-one frequency in the training text. lzma: each document compressed alone by xz at its
    strongest preset. Of a long document, both take the first 2^20 characters.
    """
    counts = np.ones(tokenizer.vocab_size)
    counted = source.validation if is_stream(source.train) else source.documents("the unigram")
    for text in sample_texts(counted, key):
        counts += np.bincount(tokenizer.encode(text[:_LONGEST]), minlength=len(counts))
    surprise = -np.log2(counts / counts.sum())
    bits = size = packed = 0.0
    for text in (sample[:_LONGEST] for sample in sample_texts(source.validation, key)):
        data = text.encode()
        bits += float(surprise[tokenizer.encode(text)].sum())
        # A dictionary longer than the document would only cost memory.
        preset = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": max(len(data), 4096)}
        packed += 8 * len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=[preset]))
        size += len(data)
    return {"unigram": bits / max(size, 1), "lzma": packed / max(size, 1)}
