"""The next batch on its way to the devices while a step runs, each batch with the position in the data after it.

Reading ahead moves the pipeline past the batch that is being trained. A checkpoint must hold the position of what was
trained, so it is taken when a batch is read, not when the checkpoint is written.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh

from jaxllm.training.sharding import place_rows


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
