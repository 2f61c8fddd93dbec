"""The compiled steps of a run, all with one path of attention, and whether they fit into its devices.

Where `model.attention: auto` may choose cuDNN, all are compiled before the first step, so that a plan that cuDNN
refuses changes the path of the whole run. Elsewhere evaluations are compiled when they are first used. Samples, which
decode, have `jaxllm.generation.loop`.
"""

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxllm.config import ModelConfig
from jaxllm.host.device import Device, host_memory
from jaxllm.models import abstract_params
from jaxllm.ops import backend
from jaxllm.ops.cudnn import or_chunked
from jaxllm.ops.losses import LossSums
from jaxllm.run.compiled import CompiledOnce
from jaxllm.training.fit import Fit, advice, check_fit, estimate_fit
from jaxllm.training.loss import Batch
from jaxllm.training.program import Program, program_of
from jaxllm.training.sharding import device_bytes, shares_of, state_shardings
from jaxllm.training.spans import make_predict_step
from jaxllm.training.train_step import StepMetrics, TrainState, with_counts, without_counts

_log = logging.getLogger(__name__)

T = TypeVar("T")


class Steps(NamedTuple):
    """The compiled steps of a run."""

    program: Program  # the pure functions
    mesh: Mesh | None  # the devices that they are compiled for, None for one
    # (state, batch) -> (state, metrics), in place
    train_step: CompiledOnce[[TrainState, Batch], tuple[TrainState, StepMetrics]]
    eval_step: CompiledOnce[[Any, Batch], LossSums]  # (params, batch) -> sums
    # (params, batch) -> the most likely targets, of an encoder-decoder
    predict: CompiledOnce[[Any, Batch], Int[Array, "B T"]] | None
    norms: CompiledOnce[[TrainState, Batch], Float[Array, "3 G"]]  # (state, batch) -> norms of the step


def make_steps(program: Program, mesh: Mesh | None) -> Steps:
    """The steps of a program on the devices of a mesh; each compiles when it is first used, unless `compile_steps`."""
    layout: dict[str, Any] = {}
    if mesh is not None:  # a step's new state stays where the old one is, whatever XLA would prefer
        layout = {"out_shardings": (state_shardings(program.abstract_state(), mesh), None)}
    step = program.train_step if program.config.data.streams == 1 else with_counts(program.train_step)
    train_step = CompiledOnce(step, name="train step", donate_argnums=0, **layout)
    eval_step = CompiledOnce(program.eval_step, name="evaluation step")
    predict = None
    if program.config.model.encoder_decoder:
        predict = CompiledOnce(make_predict_step(program, mesh), name="span evaluation")
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    norms = CompiledOnce(program.norms, name="step that computes norms", out_shardings=whole)
    return Steps(program, mesh, train_step, eval_step, predict, norms)


def compile_steps(steps: Steps, state: TrainState, batch: Batch) -> Steps:
    """Compiles the train step, and all where cuDNN might refuse a call (`steps_or_chunked`); arrays are only read."""
    return steps_or_chunked(steps, lambda each: _compile(each, state, batch))[0]


def steps_or_chunked(steps: Steps, use: Callable[[Steps], T]) -> tuple[Steps, T]:
    """`steps` and `use(steps)`, which compiles some; if cuDNN refuses a call, both of new ones, see `or_chunked`."""
    program = steps.program

    def with_model(model: ModelConfig) -> tuple[Steps, T]:
        config = dataclasses.replace(program.config, model=model)
        same = model is program.config.model
        made = steps if same else make_steps(program_of(config, steps.mesh, program.custom), steps.mesh)
        return made, use(made)

    return or_chunked(with_model, program.config.model)


def _compile(steps: Steps, state: TrainState, batch: Batch) -> None:
    rows = without_counts(batch)
    if backend.on_gpu() and steps.program.config.model.attention in ("auto", "cudnn"):
        steps.eval_step.prepare(state.params, rows)
        if steps.predict is not None:
            steps.predict.prepare(state.params, rows)
    steps.train_step.prepare(state, batch)
    if steps.program.config.training.norms_every:
        steps.norms.prepare(state, rows)


def announce_fit(program: Program, device: Device, mesh: Mesh | None = None) -> tuple[Fit, int | float]:
    """Logs the estimate; returns it, and the bytes of a device, with which `check_fit` checks the compiler's figure.

    Parameters and moments that alone exceed the device's memory are a FitError. A larger estimate is a warning: it errs
    on the safe side, but XLA:CPU needs up to three times as much. A small run, which compiles in seconds on a CPU, has
    none there.
    """
    on_cpu = device.kind == "cpu"
    params, shares = abstract_params(program.model), shares_of(mesh)
    moments = jax.eval_shape(program.optimizer.init, params)
    state = Fit(device_bytes(params, shares), device_bytes(moments, shares), 0, 0, 0)
    limit = device.memory or (host_memory() // device.count if on_cpu else math.inf)
    check_fit(state, sum(state), limit=limit)
    if limit == math.inf or (on_cpu and 100 * sum(state) < limit):
        return state, limit
    fit = estimate_fit(program, mesh)
    _log.info("%d x %s with %.1f GB each; this run: %s", device.count, device.kind, limit / 1e9, fit.table())
    if sum(fit) * (3 if on_cpu else 1) > limit:
        _log.warning("that may be too large, so the compiler's own figure will decide; %s", advice(fit))
    return fit, limit
