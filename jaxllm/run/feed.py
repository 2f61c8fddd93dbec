"""What a run reads: its corpus through the tokenizer of its folder, and the next batch on its way to the devices.

Reading ahead moves the pipeline past the batch that is being trained. A checkpoint must hold the position of what was
trained, so it is taken when a batch is read, not when the checkpoint is written.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxllm.config import DataConfig, RunConfig
from jaxllm.data import BatchError, DataError
from jaxllm.data.pipeline import Pipeline
from jaxllm.data.recipes import Objective
from jaxllm.data.sources import Source, open_sets, open_source
from jaxllm.host import processes
from jaxllm.run.record import count_rows
from jaxllm.storage.folder import DATA, check_apart, continued, settle_tokenizer
from jaxllm.training.sharding import local_rows, place_rows
from jaxllm.training.train_step import COUNTS


def open_run_pipeline(
    config: RunConfig, run_dir: Path, *, source: Source | None = None, objective: Objective | None = None
) -> Pipeline:
    """The pipeline of a run, as `build_pipeline`; with data.streams, training batches have the process's own rows."""
    training, model, origin = config.training, config.model, continued(config, run_dir)
    with processes.first_then_all():
        pipeline = build_pipeline(
            config.data,
            vocab_size=model.vocab_size,
            run_dir=run_dir,
            batch_size=training.batch_size,
            seed=training.seed,
            decoder_start_id=model.decoder_start_id if model.encoder_decoder else 0,
            source=source,
            objective=objective,
            parent=origin[0] if origin else None,
            rows=local_rows(training.batch_size) if config.data.streams > 1 else None,
        )
    processes.check_same("corpus or tokenizer", str((pipeline.identity, pipeline.sets)))
    return pipeline


def build_pipeline(
    config: DataConfig,
    *,
    vocab_size: int,
    run_dir: str | Path,
    source: Source | None = None,
    parent: Path | None = None,
    **options: Any,
) -> Pipeline:
    """Opens the corpus and the tokenizer of a run.

    Args:
        config: source, tokenizer, objective and lengths.
        vocab_size: rows of the model's embedding.
        run_dir: keeps the tokenizer, and unless `cache_dir` is set the prepared data; made where it is new.
        source: takes the place of data.source; sets of data.validation take that of its validation.
        parent: folder of the run that this one continues, its own or another, whose tokenizer it keeps.
        options: of `Pipeline`, such as batch_size and seed.

    Raises:
        DataError: naming what is missing or does not fit, and the fix.
    """
    folder = Path(run_dir).expanduser()
    check_apart(config, folder)
    cache_dir = Path(config.cache_dir or folder / DATA).expanduser()
    sets = open_sets(config, cache_dir=cache_dir)
    source = source or open_source(config, cache_dir=cache_dir)
    if sets:
        source = source._replace(validation=next(iter(sets.values())).documents("validation"), sets=sets)
    if not len(source.validation):
        raise DataError(f"the source {source.name} has no validation documents; add some, or set data.validation")
    tokenizer = settle_tokenizer(config, source, vocab_size=vocab_size, folder=folder, parent=parent)
    if (ids := tokenizer.vocab_size) > vocab_size:
        raise DataError(f"the tokenizer has {ids} ids, model.vocab_size is {vocab_size}; raise it to at least {ids}")
    return Pipeline(config, source, tokenizer, **options)


def whole_position(position: dict[str, Any]) -> dict[str, Any]:
    """The position in all streams, of which each process has those that it reads; all processes call this together."""
    if position["streams"] == 1:
        return position
    parts = [json.loads(each) for each in processes.gather(json.dumps(position["iterator"]))]
    return {**position, "iterator": {number: state for part in parts for number, state in part.items()}}


class Fetched(NamedTuple):
    """One batch: as the pipeline made it, on the devices (or being copied there), and the position after it."""

    batch: dict[str, np.ndarray]
    placed: dict[str, jax.Array]
    position: dict[str, Any]


class Prefetch:
    """Two buffers: the batch that a step reads, and the next one."""

    def __init__(self, pipeline: Pipeline, mesh: Mesh | None, *, local: bool = False) -> None:
        """Reads nothing yet. `mesh` is where batches go; `local` ones have `local_rows`, and `COUNTS` is added."""
        self._pipeline, self._mesh, self._local = pipeline, mesh, local
        self._waiting: Fetched | None = None
        self._failure: BatchError | None = None

    def take(self) -> Fetched:
        """The next batch; read now if `read_ahead` has not."""
        taken, self._waiting = self.peek(), None
        return taken

    def peek(self) -> Fetched:
        """What `take` returns next."""
        if self._failure is not None:
            raise self._failure
        if self._waiting is None:
            batch = next(self._pipeline)
            rows = {**batch, COUNTS: count_rows(batch, self._pipeline.tokenizer.token_bytes)} if self._local else batch
            placed = place_rows(rows, self._mesh, local=self._local)
            self._waiting = Fetched(batch, placed, self._pipeline.get_state())
        return self._waiting

    def read_ahead(self) -> None:
        """Reads the next batch and starts its copy, when a step has been dispatched; `take` raises what fails here."""
        try:
            self.peek()
        except BatchError as error:
            self._failure = error
