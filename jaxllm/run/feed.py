"""What a run reads: its corpus through the tokenizer of its folder, and the next batch on its way to the devices.

Reading ahead moves the pipeline past the batch that is being trained. A checkpoint must hold the position of what was
trained, so it is taken when a batch is read, not when the checkpoint is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh

from jaxllm.config import DataConfig, RunConfig
from jaxllm.data import DataError
from jaxllm.data.pipeline import Pipeline
from jaxllm.data.sources import open_source
from jaxllm.run.folder import DATA, check_apart, settle_tokenizer
from jaxllm.training.sharding import place_rows


def open_run_pipeline(config: RunConfig, run_dir: Path) -> Pipeline:
    """The pipeline of a run on one process; raises what `build_pipeline` does."""
    return build_pipeline(
        config.data,
        vocab_size=config.model.vocab_size,
        batch_size=config.training.batch_size,
        seed=config.training.seed,
        run_dir=run_dir,
        decoder_start_id=config.model.decoder_start_id if config.model.encoder_decoder else 0,
    )


def build_pipeline(
    config: DataConfig,
    *,
    vocab_size: int,
    batch_size: int,
    seed: int,
    run_dir: str | Path,
    process_index: int = 0,
    process_count: int = 1,
    decoder_start_id: int = 0,
) -> Pipeline:
    """Opens the corpus and the tokenizer of a run.

    Args:
        config: source, tokenizer, objective and lengths.
        vocab_size: rows of the model's embedding.
        batch_size: rows of a batch of this process.
        seed: of the order.
        run_dir: keeps the tokenizer, and unless `cache_dir` is set the prepared data; made where it is new.
        process_index: see `Pipeline`.
        process_count: see `Pipeline`.
        decoder_start_id: see `Pipeline`.

    Raises:
        DataError: naming what is missing or does not fit, and the fix.
    """
    folder = Path(run_dir).expanduser()
    check_apart(config, folder)
    source = open_source(config, cache_dir=Path(config.cache_dir or folder / DATA).expanduser())
    tokenizer = settle_tokenizer(config, source, vocab_size=vocab_size, folder=folder)
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} ids, model.vocab_size is {vocab_size}; raise it to at least "
            f"{tokenizer.vocab_size}"
        )
    return Pipeline(
        config,
        source,
        tokenizer,
        batch_size=batch_size,
        seed=seed,
        process_index=process_index,
        process_count=process_count,
        decoder_start_id=decoder_start_id,
    )


@runtime_checkable
class Batches(Protocol):
    """What is read of a `jaxllm.data.pipeline.Pipeline`."""

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch."""
        ...

    def get_state(self) -> dict[str, Any]:
        """The position after it."""
        ...


class Fetched(NamedTuple):
    """One batch.

    Attributes:
        batch: as the pipeline made it, for what the host counts.
        placed: the same on the devices, or being copied there.
        position: state of the pipeline from which the batch after this one follows.
    """

    batch: dict[str, np.ndarray]
    placed: dict[str, jax.Array]
    position: dict[str, Any]


class Prefetch:
    """Two buffers: the batch that a step reads, and the one that comes next."""

    def __init__(self, pipeline: Batches, mesh: Mesh | None) -> None:
        """Reads nothing yet. `mesh` is where batches go, see `jaxllm.training.sharding`."""
        self._pipeline, self._mesh = pipeline, mesh
        self._waiting: Fetched | None = None

    def take(self) -> Fetched:
        """The next batch; read now if `read_ahead` has not."""
        taken, self._waiting = self._waiting or self._read(), None
        return taken

    def read_ahead(self) -> Fetched:
        """Reads the next batch and starts its copy, and leaves it there; call it when a step has been dispatched."""
        self._waiting = self._waiting or self._read()
        return self._waiting

    def _read(self) -> Fetched:
        batch = next(self._pipeline)
        return Fetched(batch, place_rows(batch, self._mesh), self._pipeline.get_state())
