"""What the host does about overflows: names them, measures the headroom that is left, and stops when nothing helps.

A step returns which gradient overflowed; the first bad value is found by computing the same batch again and observing
it (`jaxllm.jaxprs.observe`). The host reads a step while the next one runs, so the parameters are at most one step
later, and the same when that step was skipped. A step that was not skipped has spoiled the parameters,
so the trainer passes those of its last checkpoint. Skipping is in `jaxllm.training.precision`.
"""

import dataclasses
import functools
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxllm.host import processes
from jaxllm.jaxprs.observe import Observer, first_nonfinite, headroom
from jaxllm.training.attribution import gradient_groups
from jaxllm.training.loss import Batch
from jaxllm.training.program import Program, program_of
from jaxllm.training.sharding import device_keys, largest, map_rows, with_ends
from jaxllm.training.train_step import StepMetrics, TrainState, accumulate_gradients, total_weight

_log = logging.getLogger(__name__)


class OverflowWatch:
    """The host's view of the loss scale of one run."""

    def __init__(self, program: Program, params: Any, *, mesh: Mesh | None = None) -> None:
        """Compiles nothing yet. `mesh` is where batches are."""
        config = program.config
        self._limit = config.precision.max_overflows
        self._groups = gradient_groups(params)
        self._observes = config.precision.compute == "float16"
        self._accumulation = config.training.accumulation
        # A scan over layers gives readings by layer; the parameters are the same either way.
        by_layer = dataclasses.replace(config, model=dataclasses.replace(config.model, layers="scan"))
        program = program_of(by_layer, custom=program.custom)
        self._dtype, loss = program.dtype, with_ends(program.loss)
        keys, spread = device_keys(mesh), functools.partial(map_rows, mesh=mesh, dtype=program.dtype, combine=largest)

        def forward(params: Any, batch: Batch, key: jax.Array) -> Any:
            return loss(params, {name: rows[:: self._accumulation] for name, rows in batch.items()}, keys(key))

        def gradients(params: Any, batch: Batch, key: jax.Array, factor: jax.Array) -> Any:
            options: Any = {"factor": factor, "accumulation": self._accumulation, "device_keys": keys}
            return accumulate_gradients(loss, params, batch, key, **options)

        self._forward, self._gradients = (Observer(each, program.dtype, spread) for each in (forward, gradients))

    def check(self, step: int, values: StepMetrics, state: TrainState, batch: Batch) -> str | None:
        """Logs an overflow of step `step`; returns why the run must stop, if it must."""
        if values.culprit < 0:
            return None
        scale = float(values.loss_scale)
        value = self.first_value(step, state, batch, scale=scale)
        cause = f"first non-finite gradient: {self._groups[int(values.culprit)]}; first non-finite value: {value}"
        level = logging.WARNING if processes.index() == 0 else logging.INFO  # all find the same
        _log.log(level, "step %d: overflow at loss scale 2^%g; %s", step, math.log2(scale), cause)
        if values.at_floor < self._limit:
            return None
        return f"{int(values.at_floor)} overflows in a row with the loss scale at its floor of {scale:g}: {cause}"

    def first_value(self, step: int, state: TrainState, batch: Batch, *, scale: float = 1.0) -> str:
        """The first value that is not finite when step `step` is computed again with the parameters of `state`."""
        key = jax.random.fold_in(state.key, step - 1)
        factor = jnp.float32(scale) / total_weight(batch)
        where = first_nonfinite(self._gradients(state.params, batch, key, factor))
        if where is None:
            return "none when computed again"
        return f"{where.name} in the {'backward' if where.backward else 'forward'} pass"

    def headroom(self, step: int, state: TrainState, batch: Batch) -> dict[str, float]:
        """Doublings left to each block's activations in a microbatch's rows of a float16 run; else empty."""
        if not self._observes:
            return {}
        readings = self._forward(state.params, batch, jax.random.fold_in(state.key, step - 1))
        return {f"headroom/{block}": bits for block, bits in headroom(readings, self._dtype).items()}
