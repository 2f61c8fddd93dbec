"""`data.streams`: parts of the corpus that are read apart, each for its rows of every batch, whoever reads them."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxllm.config import DataConfig
from jaxllm.config.file import ConfigError, parse_config
from jaxllm.data import DataError
from jaxllm.data.packing import Batch
from jaxllm.data.pipeline import Pipeline
from jaxllm.data.sources import Source
from jaxllm.run.feed import build_pipeline

ROWS, STEPS = 8, 12


@contextlib.contextmanager
def opened(corpus: Path, rows: range | None = None, *, source: Source | None = None, **data: Any) -> Iterator[Pipeline]:
    settings = {"source": "files", "path": str(corpus), "sequence_length": 32, "validation_fraction": 0.2, **data}
    options = {"vocab_size": 420, "batch_size": ROWS, "seed": 3, "run_dir": corpus.parent / "run", "source": source}
    with contextlib.closing(build_pipeline(DataConfig(**settings), rows=rows, **options)) as pipeline:
        yield pipeline


def read(pipeline: Pipeline, count: int = STEPS) -> list[Batch]:
    return list(itertools.islice(pipeline, count))


def assert_same(found: list[Batch], wanted: list[Batch]) -> None:
    for batch, other in zip(found, wanted, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], strict=True)


def parts_of(size: int) -> list[range]:
    return [range(first, first + size) for first in range(0, ROWS, size)]


def joined(parts: list[list[Batch]]) -> list[Batch]:
    """Batches of whole rows from those of each part."""
    return [
        {name: np.concatenate([part[name] for part in each]) for name in each[0]} for each in zip(*parts, strict=True)
    ]


@pytest.mark.parametrize("objective", ["causal", "span_corruption"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_any_division_of_the_rows_gives_the_same_batches(corpus: Path, objective: str, size: int) -> None:
    """Also after a resume with another division; with rows of one, two processes read each of the four streams."""
    options = {"objective": objective, "streams": 4}
    with opened(corpus, **options) as pipeline:
        wanted = read(pipeline)
    found, iterators = [], {}
    for rows in parts_of(size):
        with opened(corpus, rows, **options) as pipeline:
            found.append(read(pipeline, 5))
            iterators |= pipeline.get_state()["iterator"]
            position = pipeline.get_state()
    assert_same(joined(found), wanted[:5])
    assert sorted(iterators) == ["0", "1", "2", "3"]
    for other in {1, 2, ROWS} - {size}:
        found = []
        for rows in parts_of(other):
            with opened(corpus, rows, **options) as pipeline:
                pipeline.set_state(json.loads(json.dumps({**position, "iterator": iterators})))
                found.append(read(pipeline, STEPS - 5))
        assert_same(joined(found), wanted[5:])


def test_worker_processes_change_no_batch(corpus: Path) -> None:
    with opened(corpus, streams=2) as pipeline:
        wanted = read(pipeline, 4)
    with opened(corpus, streams=2, workers=2) as pipeline:
        assert_same(read(pipeline, 4), wanted)


class Noting(list[dict[str, Any]]):
    """Documents, and the numbers of those that were read."""

    def __init__(self, documents: list[dict[str, Any]]) -> None:
        super().__init__(documents)
        self.read: set[int] = set()

    def __getitem__(self, number: Any) -> Any:
        self.read.add(number)
        return super().__getitem__(number)


def test_a_reader_reads_the_documents_of_its_streams_alone_and_all_together_every_one(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxllm.data.pipeline.sample_texts", lambda records, key: ["x" * 1000])
    texts = [{"text": path.read_text()} for path in sorted(corpus.iterdir())]
    with opened(corpus) as pipeline:
        pipeline.tokenizer.save(corpus.parent / "given.json")
    for stream, rows in enumerate(parts_of(2)):
        noting = Noting(texts)
        source = Source("noting", noting, texts[:2])
        with opened(corpus, rows, source=source, streams=4, tokenizer=str(corpus.parent / "given.json")) as pipeline:
            read(pipeline, 200)
        assert noting.read == set(range(stream, len(texts), 4))


def test_streams_are_different_and_one_is_the_order_without_the_setting(corpus: Path) -> None:
    with opened(corpus, streams=2) as pipeline:
        (batch,) = read(pipeline, 1)
    assert not (batch["tokens"][: ROWS // 2] == batch["tokens"][ROWS // 2 :]).all()
    with opened(corpus) as pipeline, opened(corpus, streams=1) as other:
        assert_same(read(pipeline, 3), read(other, 3))


def test_a_position_belongs_to_its_number_of_streams(corpus: Path) -> None:
    """One without the number is of an earlier version, which had a single stream."""
    with opened(corpus, streams=2) as two, opened(corpus) as one:
        position = one.get_state()
        with pytest.raises(DataError, match="made with streams 2, this run has 1; resume with the same"):
            one.set_state(two.get_state())
        del position["streams"]
        one.set_state(position)
        with pytest.raises(DataError, match="made with streams 1, this run has 2"):
            two.set_state(position)


def test_what_cannot_be_divided_is_refused(corpus: Path) -> None:
    model = {"family": "llama", "vocab_size": 420, "d_model": 16, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    with pytest.raises(ConfigError, match=r"data\.streams 3 does not divide training\.batch_size 8"):
        parse_config({"model": model, "data": {"streams": 3}, "training": {"batch_size": 8}})
    few = Source("few", [{"text": "a few words"}] * 3, [{"text": "more"}])
    with (
        pytest.raises(DataError, match=r"data\.streams 4 needs as many documents, few has 3"),
        opened(corpus, source=few, streams=4),
    ):
        pass

    class Endless:
        def __next__(self) -> dict[str, str]:
            return {"text": "again"}

        def get_state(self) -> int:
            return 0

        def set_state(self, state: int) -> None:
            pass

    endless = Source("endless", Endless(), [{"text": "more"}])
    with opened(corpus) as pipeline:
        pipeline.tokenizer.save(corpus.parent / "given.json")
    given = str(corpus.parent / "given.json")
    refusal = r"data\.streams needs documents by number, and the source endless is a stream"
    with pytest.raises(DataError, match=refusal), opened(corpus, source=endless, streams=2, tokenizer=given):
        pass
