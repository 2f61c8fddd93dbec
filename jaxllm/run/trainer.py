"""A run, from its config to its last step: `pretrain` opens, builds, restores, compiles, checks, trains and finishes.

Step n is dispatched before the metrics of step n-1 are read, and batch n+1 is copied to the device while it runs, so
that the device never waits for the host. A stop signal, or a batch that cannot be made, stops the run between steps
with a checkpoint. A loss that is not finite, or a loss scale that can't shrink any more, stops it without one.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxllm.config import RunConfig
from jaxllm.data import BatchError
from jaxllm.data.packing import segments_of
from jaxllm.data.pipeline import Pipeline
from jaxllm.data.recipes import Objective
from jaxllm.data.sources import Source
from jaxllm.data.tokenizer import encode_blanks
from jaxllm.host import processes
from jaxllm.host.device import compilation_cache, detect_device
from jaxllm.host.processes import stop_signals
from jaxllm.models import count_params
from jaxllm.run.compiled import explained
from jaxllm.run.console import nobody_listens, training_console
from jaxllm.run.evaluation import evaluate, target_bytes
from jaxllm.run.feed import Prefetch, open_run_pipeline
from jaxllm.run.fit import announce_fit
from jaxllm.run.overflow import OverflowWatch
from jaxllm.run.parts import OnEvaluate, OnStep, StepReport, check_parts, describe_parts, write_parts
from jaxllm.run.record import MetricsWriter, Throughput, log_step, log_validation, plot_curve, read_metrics, step_row
from jaxllm.run.samples import on_one_device, write_sample
from jaxllm.run.start import Start, find_start
from jaxllm.run.steps import Steps, compile_steps, make_steps
from jaxllm.storage.checkpoint import Checkpoints
from jaxllm.storage.folder import CHECKPOINTS, METRICS, open_run_folder, settle_residual, write_config
from jaxllm.training.optimizer import build_schedule, phases
from jaxllm.training.program import LossBuilder, Own, Program, program_of
from jaxllm.training.sharding import check_rows, make_mesh
from jaxllm.training.train_step import StepMetrics, TrainState

_log = logging.getLogger(__name__)
_SOON = 10  # steps after a resume, within which damage of its checkpoint shows


class TrainingStopped(RuntimeError):
    """Training cannot continue; the message names the step and the last good checkpoint."""


class Summary(NamedTuple):
    """What a call of `pretrain` did."""

    step: int  # optimizer steps done in total
    resumed_from: int  # step at which the call started, 0 for a new run
    finished: bool  # whether the last step was reached
    validation: dict[str, float]  # the newest evaluation and its step, as `evaluate`; empty without one
    folder: Path  # the run folder
    metrics: list[dict[str, Any]]  # all rows of metrics.jsonl, earlier sessions included


class Parts(NamedTuple):
    """What a run works with; none of it is replaced after the steps are compiled."""

    folder: Path
    pipeline: Pipeline
    feed: Prefetch
    steps: Steps
    schedule: optax.Schedule | None  # None for an optimizer that the caller gave
    checkpoints: Checkpoints
    writer: MetricsWriter
    overflow: OverflowWatch
    meter: Throughput
    on_step: Sequence[OnStep]
    on_evaluate: OnEvaluate | None

    @property
    def config(self) -> RunConfig:
        """The config as it is in the run folder."""
        return self.steps.program.config


class Pending(NamedTuple):
    """A dispatched step whose metrics have not been read."""

    step: int
    metrics: StepMetrics
    batch: dict[str, np.ndarray]


@dataclasses.dataclass
class Progress:
    """How far a run is: what changes from step to step."""

    state: TrainState  # train state on the devices; each step replaces it in place
    step: int  # optimizer steps dispatched
    position: dict[str, Any]  # position in the data after the batch of that step
    fingerprinted: int = -1  # newest step whose state has its fingerprint in the record, saved or not; -1 without one
    # step of the checkpoint that the run resumed from, if it could not be verified; otherwise None
    doubtful: int | None = None
    validation: dict[str, float] = dataclasses.field(default_factory=dict)  # the newest evaluation, and its step
    unread: Pending | None = None  # the newest step, until its metrics are read


def pretrain(
    config: RunConfig,
    *,
    optimizer: optax.GradientTransformation | None = None,
    loss: LossBuilder | None = None,
    source: Source | None = None,
    recipe: Objective | None = None,
    on_step: OnStep | None = None,
    on_evaluate: OnEvaluate | None = None,
    stop_at: int | None = None,
    accept_other_parts: bool = False,
) -> Summary:
    """Trains, or continues training, the run of `config.training.run_dir`.

    Shows log and progress, unless the program has its own handler for the logger `jaxllm` or for all. docs/parts.md has
    an example of each part.

    Args:
        config: the run.
        optimizer: in place of the config's, see `jaxllm.training.program.Own`; the column learning_rate is null.
        loss: in place of `build_loss`, see `Own`.
        recipe: in place of the objective's, see `Own`.
        source: in place of `data.source`: documents by number, or a stream with a position.
        on_step: called with each `StepReport`, one step late.
        on_evaluate: (step, metrics, parameters) -> more metrics for metrics.jsonl, or None.
        stop_at: save and return after this step, for sessions of limited length.
        accept_other_parts: continue a run that was trained with another loss, source or recipe, or with another
            optimizer whose state has the same form.

    Raises:
        ValueError (ConfigError, DataError, FitError), CheckpointError, DeviceError: before training, naming the value
            and the fix; config, tokenizer and checkpoints of the folder are then as they were.
        BatchError: when a batch cannot be made; the step that was reached is saved.
        TrainingStopped: when the loss is not finite, or gradients overflow whatever the loss scale.
    """
    until = _last_step(config, stop_at)
    config = settle_residual(config)
    own = Own(loss, optimizer, recipe)
    given = describe_parts(own, source)
    with explained("run"), ExitStack() as stack:
        callbacks = [stack.enter_context(training_console(config))] if nobody_listens() else []
        # Open.
        stack.enter_context(compilation_cache(config.training.compilation_cache))
        folder = stack.enter_context(open_run_folder(config, own_rates=optimizer is not None))
        check_parts(folder, given, accept_other=accept_other_parts)
        pipeline = stack.enter_context(closing(open_run_pipeline(config, folder, source=source, objective=recipe)))
        # Build.
        device = detect_device()
        mesh = make_mesh(fsdp=config.sharding.fsdp)
        steps = make_steps(program_of(config, mesh, own), mesh)
        if config.model.encoder_decoder and config.training.sample_tokens:
            encode_blanks(config.training.sample_prompt, pipeline.tokenizer)  # refuses a blank now, not after the run
        check_memory = announce_fit(steps.program, device, mesh)
        meter = Throughput(config, pipeline.recipe.lengths, device)
        # Restore.
        checkpoints = stack.enter_context(closing(Checkpoints(folder / CHECKPOINTS, keep=config.training.keep)))
        stack.enter_context(processes.together())
        progress = _restore(steps, checkpoints, pipeline)
        resumed_from = progress.step
        baselines = pipeline.baselines()
        _announce(steps.program, pipeline, baselines)
        feed = Prefetch(pipeline, mesh)
        with stop_signals() as stopped:
            # Compile and check memory; only then open the record and write the config.
            if progress.step < until:
                steps = compile_steps(steps, progress.state, feed.peek().placed)
                check_memory(steps.train_step.needed)
                processes.check_same("attention", steps.program.config.model.attention)  # after the slowest compiler
            writer = stack.enter_context(closing(MetricsWriter(folder, resume_step=progress.step)))
            if progress.step < until:
                write_config(steps.program.config, folder)
                write_parts(folder, given)
            # Loop.
            schedule = build_schedule(config.optimizer, steps=config.training.steps) if optimizer is None else None
            overflow = OverflowWatch(steps.program, progress.state.params, mesh=mesh)
            made = (folder, pipeline, feed, steps, schedule, checkpoints, writer, overflow, meter)
            parts = Parts(*made, [*callbacks, *filter(None, [on_step])], on_evaluate)
            _loop(parts, progress, until=until, stopped=stopped)
        if finished := progress.step == config.training.steps:
            _finish(parts, progress, baselines)
        processes.gather("finished")  # the others wait for the sample
        rows = read_metrics(folder / METRICS)
        return Summary(progress.step, resumed_from, finished, progress.validation, folder, rows)


def _last_step(config: RunConfig, stop_at: int | None) -> int:
    """The step to stop after; raises ValueError for what no run can do here."""
    training = config.training
    if stop_at is not None and stop_at < 1:
        raise ValueError(f"stop_at must be at least 1, got {stop_at}")
    check_rows(batch_size=training.batch_size, accumulation=training.accumulation, devices=jax.device_count())
    return training.steps if stop_at is None else min(training.steps, stop_at)


def _restore(steps: Steps, checkpoints: Checkpoints, pipeline: Pipeline) -> Progress:
    """The run's newest checkpoint, or its beginning, with the pipeline at the same place."""
    start = find_start(steps.program, checkpoints, mesh=steps.mesh, tokenizer=pipeline.tokenizer)
    if start.data is None:
        return Progress(start.state, start.step, pipeline.get_state())
    pipeline.set_state(start.data)
    note = f"; {start.skipped} newer damaged ones set aside" if start.skipped else ""
    _log.info("resuming %s from step %d%s", checkpoints.folder.parent, start.step, note)
    doubtful = None if start.verified else start.step
    return Progress(start.state, start.step, pipeline.get_state(), fingerprinted=start.step, doubtful=doubtful)


def _announce(program: Program, pipeline: Pipeline, baselines: dict[str, float]) -> None:
    family, compute = program.config.model.family, program.config.precision.compute
    size, ids = count_params(program.model) / 1e6, pipeline.tokenizer.vocab_size
    _log.info("%s, %.2fM parameters, %s in %s, tokenizer of %d", family, size, pipeline.source_name, compute, ids)
    _log.info("baselines: %s", _listed(baselines))
    rule, steps = program.config.optimizer, program.config.training.steps
    shorter = phases(rule, steps=steps)
    if program.own.optimizer is None and shorter != (rule.warmup_steps, rule.decay_steps):
        _log.info("optimizer.warmup_steps and decay_steps are shortened to %d and %d of %d steps", *shorter, steps)


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


def _loop(parts: Parts, progress: Progress, *, until: int, stopped: Callable[[], bool]) -> None:
    """Steps up to `until`, to a stop signal, or to a batch that cannot be made; saves the step that was reached."""
    failure: BatchError | None = None
    try:
        while progress.step < until and not stopped():
            _step(parts, progress, until=until)
    except BatchError as error:
        if processes.several():
            raise  # the others may have their batch, and do not save this step
        failure = error
    _read(parts, progress, progress.unread)
    parts.checkpoints.wait()
    while progress.step not in parts.checkpoints.steps():  # tries again until saves in a row have failed
        _save(parts, progress)
        parts.checkpoints.wait()
    if failure is not None:
        raise BatchError(f"{failure}; the run is saved at step {progress.step}") from failure
    if progress.step < parts.config.training.steps:
        _log.info("stopped at step %d; the same command resumes there", progress.step)


def _step(parts: Parts, progress: Progress, *, until: int) -> None:
    """One step, the metrics of the step before it, and the evaluation and the checkpoint that are due."""
    training = parts.config.training
    previous, progress.unread = progress.unread, _dispatch(parts, progress, until=until)
    _read(parts, progress, previous)
    evaluates = progress.step % training.eval_every == 0 or progress.step == training.steps
    saves = progress.step % training.save_every == 0
    if evaluates or saves or progress.step == until:
        _read(parts, progress, progress.unread)
        progress.unread = None
    parts.checkpoints.poll()
    if evaluates:
        _evaluate(parts, progress)
    if saves:
        _save(parts, progress)


def _dispatch(parts: Parts, progress: Progress, *, until: int) -> Pending:
    """Starts the next step, and the copy of the batch after it."""
    with parts.meter.waiting():
        batch, placed, progress.position = parts.feed.take()
    progress.state, metrics = parts.steps.train_step(progress.state, placed)
    progress.step += 1
    if progress.step < until:
        with parts.meter.waiting():
            parts.feed.read_ahead()
    return Pending(progress.step, metrics, batch)


def _read(parts: Parts, progress: Progress, pending: Pending | None) -> None:
    """Reads the metrics of a step, if it has not been read: records them, or stops the run where they are bad."""
    if pending is None:
        return
    config = parts.config
    values = StepMetrics(*(value.item() for value in jax.device_get(pending.metrics)))
    scaling = config.precision.loss_scale != "none"
    if not scaling and not (math.isfinite(values.loss) and math.isfinite(values.grad_norm)):
        start = _last_good(parts, progress)
        value = parts.overflow.first_value(pending.step, start.state, pending.batch)
        cause = f"first non-finite value: {value} (with the parameters of step {start.step})"
        _stop(parts, progress, start, pending.step, f"loss {values.loss}, gradient norm {values.grad_norm}, {cause}")
    with parts.meter.paused():
        reason = parts.overflow.check(pending.step, values, progress.state, pending.batch)
    if reason is not None:
        _stop(parts, progress, _last_good(parts, progress), pending.step, reason)
    parts.meter.add(_tokens(pending.batch))
    if pending.step % config.training.log_every == 0 or pending.step == 1:
        _record(parts, progress, pending, values)
    report = StepReport(pending.step, values, pending.batch, lambda: jax.tree.map(jnp.copy, progress.state))
    with parts.meter.paused():
        for callback in parts.on_step:
            callback(report)


def _record(parts: Parts, progress: Progress, pending: Pending, values: StepMetrics) -> None:
    """Writes the row of a step."""
    config = parts.config
    rate = parts.schedule and np.asarray(parts.schedule(pending.step - 1 - int(values.skipped))).item()
    size = target_bytes(pending.batch, parts.pipeline.tokenizer)
    row = step_row(config, values, size=size, learning_rate=rate, speed=parts.meter.read())
    with parts.meter.paused():
        row |= parts.overflow.headroom(pending.step, progress.state, pending.batch)
    parts.writer.write(pending.step, row)
    log_step(config, pending.step, row)


def _evaluate(parts: Parts, progress: Progress) -> None:
    with parts.meter.paused():
        values = evaluate(parts.steps, progress.state.params, parts.pipeline)
        if parts.on_evaluate is not None:
            own = parts.on_evaluate(progress.step, values, progress.state.params) or {}
            values = {name: float(value) for name, value in own.items()} | values
    progress.validation = {**values, "step": progress.step}
    parts.writer.write(progress.step, {f"validation/{name}": value for name, value in values.items()})
    log_validation(progress.step, values)


def _save(parts: Parts, progress: Progress) -> None:
    loss = progress.validation.get("loss") if progress.validation.get("step") == progress.step else None
    saved = parts.checkpoints.save(progress.step, progress.state, progress.position, validation_loss=loss)
    if progress.fingerprinted < progress.step:
        parts.writer.write(progress.step, {"fingerprint": saved})
        progress.fingerprinted = progress.step


def _last_good(parts: Parts, progress: Progress) -> Start:
    """The newest whole checkpoint, or the beginning, in the place of a state that is spoiled."""
    for leaf in jax.tree.leaves(progress.state):
        leaf.delete()  # a device may have no room for two states
    parts.checkpoints.wait()
    steps, tokenizer = parts.steps, parts.pipeline.tokenizer
    return find_start(steps.program, parts.checkpoints, mesh=steps.mesh, tokenizer=tokenizer)


def _stop(parts: Parts, progress: Progress, start: Start, step: int, reason: str) -> NoReturn:
    """Stops a run whose values are bad, with what to do about it."""
    folder, doubtful = parts.checkpoints.folder, progress.doubtful
    if doubtful is not None and step - doubtful <= _SOON:
        older = [saved for saved in parts.checkpoints.steps() if saved < doubtful]
        fix = f"run the same command, which resumes from step {older[-1]}" if older else "start again, as none is older"
        raise TrainingStopped(
            f"{reason} at step {step}, soon after the run resumed from step {doubtful}. That checkpoint has no "
            f"fingerprint and may be damaged: move those from step {doubtful} on out of {folder} and {fix}"
        )
    where, again = f"step {start.step} in {folder}", f", from new parameters or with training.init_from={parts.folder}"
    if start.data is None:
        where, again = "none yet", ""
    newest = "last good checkpoint" if start.verified else "newest checkpoint (it has no fingerprint to verify it by)"
    raise TrainingStopped(
        f"{reason} at step {step}; the {newest} is {where}. Lower optimizer.learning_rate, lengthen "
        f"warmup_steps or tighten clip_norm, and start another training.run_dir{again}"
    )


def _finish(parts: Parts, progress: Progress, baselines: dict[str, float]) -> None:
    """Writes a sample of the model's text and draws the curve."""
    config, metric = parts.config, parts.config.model.metric
    if metric in progress.validation:
        value = progress.validation[metric]
        _log.info("validation %s %.3f (%s)", metric.replace("_", " "), value, _listed(baselines))
    params = on_one_device(parts.steps.program, parts.steps.mesh, progress.state.params)
    if processes.index() > 0:
        return
    text = params and write_sample(parts.folder, parts.steps.program.model, params, parts.pipeline, config.training)
    if text:
        _log.info("sample:\n%s", text)
    try:
        _log.info("curve in %s", plot_curve(parts.folder, baselines=baselines, name=metric))
    except (ImportError, OSError, ValueError, OverflowError) as error:  # a finished run must not fail for a picture
        _log.warning("no curve is drawn: %s", error)


def _tokens(batch: dict[str, np.ndarray]) -> float:
    """Tokens that are not padding, on both sides of an encoder-decoder."""
    source = np.count_nonzero(segments_of(batch)[0]) if "encoder_tokens" in batch else 0
    return float(np.count_nonzero(batch["weights"]) + source)
