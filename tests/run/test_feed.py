"""Reading ahead changes when a batch is read, never which one is trained or what a checkpoint remembers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxllm.config import DataConfig
from jaxllm.data import DataError
from jaxllm.data.pipeline import Pipeline
from jaxllm.data.sources import Source
from jaxllm.run.feed import Prefetch, build_pipeline


class Counting(Pipeline):
    """A pipeline of batches 0, 1, 2, ... whose position is the number of the next."""

    def __init__(self) -> None:
        self.next = 0

    def __next__(self) -> dict[str, np.ndarray]:
        self.next += 1
        return {"tokens": np.full((2, 3), self.next - 1, np.int32)}

    def get_state(self) -> dict[str, Any]:
        return {"next": self.next}


def test_one_batch_is_read_ahead_and_keeps_its_own_position() -> None:
    pipeline = Counting()
    batches = Prefetch(pipeline, None)
    assert pipeline.next == 0
    for number in range(4):
        taken = batches.take()
        assert pipeline.next == number + 1  # read ahead: the first is not, and nothing is read twice
        batches.read_ahead()
        batches.read_ahead()  # there are two buffers: the one in use and the next
        assert pipeline.next == number + 2
        assert taken.batch["tokens"][0, 0] == number and taken.position == {"next": number + 1}
        assert isinstance(taken.placed["tokens"], jax.Array)
        np.testing.assert_array_equal(taken.placed["tokens"], taken.batch["tokens"])


def test_a_position_is_not_moved_by_what_is_read_later(tmp_path: Path, corpus: Path) -> None:
    """From the position of any batch the pipeline continues with the next one, although more had been read by then."""
    config = DataConfig(source="files", path=str(corpus), sequence_length=32, validation_fraction=0.2)
    options = {"vocab_size": 400, "batch_size": 4, "seed": 0, "run_dir": tmp_path}
    batches = Prefetch(pipeline := build_pipeline(config, **options), None)
    fetched = []
    for _ in range(5):
        fetched.append(batches.take())
        batches.read_ahead()
    pipeline.set_state(fetched[2].position)
    for name, tokens in next(pipeline).items():
        np.testing.assert_array_equal(tokens, fetched[3].batch[name])
    pipeline.close()


def test_a_source_without_validation_documents_is_refused(tmp_path: Path) -> None:
    """Its loss over no token would be 0, and its first checkpoint would always be the best."""
    source = Source("mine", [{"text": "one two three"}] * 9, [])
    with pytest.raises(DataError, match=r"^the source mine has no validation documents; add some, or set data.valid"):
        build_pipeline(DataConfig(), vocab_size=400, run_dir=tmp_path, source=source, batch_size=4, seed=0)
