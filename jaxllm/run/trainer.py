"""A run, from its config to its last step: `pretrain` opens, builds, restores, compiles, checks, trains and finishes.

Step n is dispatched before the metrics of step n-1 are read, and batch n+1 is copied to the device while it runs, so
that the device never waits for the host. A stop signal, or a batch that cannot be made, stops the run between steps
with a checkpoint. A loss that is not finite, or a loss scale that can't shrink any more, stops it without one.
"""

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxllm.config import RunConfig
from jaxllm.config.run import seconds_of
from jaxllm.data import BatchError
from jaxllm.data.pipeline import Pipeline
from jaxllm.data.recipes import Objective
from jaxllm.data.sources import Source
from jaxllm.host import processes
from jaxllm.host.device import compilation_cache, detect_device
from jaxllm.host.signals import stop_signals
from jaxllm.models import Model, count_params
from jaxllm.run import record
from jaxllm.run.compiled import explained, shared_cache
from jaxllm.run.console import nobody_listens, training_console
from jaxllm.run.evaluation import evaluate
from jaxllm.run.feed import Prefetch, open_run_pipeline, whole_position
from jaxllm.run.overflow import OverflowWatch
from jaxllm.run.parts import OnEvaluate, OnStep, StepReport, Summary, check_parts, describe_parts, write_parts
from jaxllm.run.profile import Window
from jaxllm.run.record import MetricsWriter, Sums, Throughput, log_step, log_validation, plot_curve
from jaxllm.run.samples import check_prompt, on_one_device, optional, write_sample
from jaxllm.run.start import find_start, stop
from jaxllm.run.steps import Steps, announce_fit, compile_steps, make_steps
from jaxllm.run.trackers import Tracker, check_trackers
from jaxllm.storage.checkpoint import Checkpoints
from jaxllm.storage.checkpoint_reading import Restored
from jaxllm.storage.folder import CHECKPOINTS, PROFILE, continued, open_run_folder, settle_residual, write_config
from jaxllm.training.attribution import norms_row
from jaxllm.training.fit import check_fit
from jaxllm.training.optimizer import build_schedule, phases
from jaxllm.training.program import CustomParts, LossBuilder, Program, program_of
from jaxllm.training.sharding import check_rows, make_mesh
from jaxllm.training.train_step import StepMetrics, TrainState, without_counts

_log = logging.getLogger(__name__)
_SUMS = "row_sums"  # key of `Progress.sums` next to the position in a checkpoint, absent where there are none


class Run(NamedTuple):
    """The objects of a run; none of them is replaced after the steps are compiled."""

    folder: Path
    pipeline: Pipeline
    feed: Prefetch
    steps: Steps
    checkpoints: Checkpoints
    writer: MetricsWriter
    overflow: OverflowWatch
    meter: Throughput
    window: Window
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
    placed: Mapping[str, Any]  # the batch on the devices, as a model reads it
    norms: jax.Array | None  # of `Steps.norms`, where they are due


@dataclasses.dataclass
class Progress:
    """How far a run is: what changes from step to step."""

    state: TrainState  # train state on the devices; each step replaces it in place
    step: int  # optimizer steps dispatched
    position: dict[str, Any]  # position in the data after the batch of that step
    sums: Sums = dataclasses.field(default_factory=dict)  # of the steps since the last row of metrics.jsonl
    branched: bool = False  # whether the run begins with the state of another, and has not saved it
    validation: dict[str, float] = dataclasses.field(default_factory=dict)  # the newest evaluation, and its step
    unread: Pending | None = None  # the newest step, until its metrics are read


def pretrain(
    config: RunConfig,
    *,
    optimizer: optax.GradientTransformation | None = None,
    loss: LossBuilder | None = None,
    model: Callable[[Model], Model] | None = None,
    source: Source | None = None,
    recipe: Objective | None = None,
    on_step: OnStep | None = None,
    on_evaluate: OnEvaluate | None = None,
    tracker: Tracker | None = None,
    stop_at: int | None = None,
    accept_other_parts: bool = False,
) -> Summary:
    """Trains, or continues training, the run of `config.training.run_dir`.

    Shows log and progress, unless the program has its own handler for the logger `jaxllm` or for all. docs/parts.md has
    an example of each part.

    Args:
        config: the run.
        optimizer: in place of the config's, see `training.program.CustomParts`; the column learning_rate is null.
        loss: in place of `build_loss`, see `CustomParts`.
        model: the config's model -> the model of training, evaluation and sample, see `CustomParts`.
        recipe: in place of the objective's, see `CustomParts`.
        source: in place of `data.source`: documents by number, or a stream with a position.
        on_step: called with each `StepReport`, one step late.
        on_evaluate: (step, metrics, parameters) -> more metrics for metrics.jsonl, or None.
        tracker: called with the step and the rest of each new row of metrics.jsonl, in addition to `training.trackers`.
        stop_at: save and return after this step, for sessions of limited length.
        accept_other_parts: continue a run that was trained with another loss, model, source or recipe, or with another
            optimizer whose state has the same form.

    Raises:
        ValueError (ConfigError, DataError, FitError), CheckpointError, DeviceError: before training, naming the value
            and the fix; config, tokenizer and checkpoints of the folder are then as they were.
        BatchError: when a batch cannot be made; the step that was reached is saved.
        TrainingStopped: when the loss is not finite, or gradients overflow whatever the loss scale.
    """
    deadline = time.monotonic() + seconds_of(config.training.stop_after)
    until = _last_step(config, stop_at)
    config = settle_residual(config)
    custom, origin = CustomParts(loss, optimizer, recipe, model), continued(config)
    given = describe_parts(custom, source)
    with explained("run"), ExitStack() as stack:
        callbacks = [stack.enter_context(training_console(config))] if nobody_listens() else []
        # Open.
        stack.enter_context(compilation_cache(shared_cache(config.training.compilation_cache)))
        folder = stack.enter_context(open_run_folder(config, custom_optimizer=optimizer is not None))
        check_parts(origin[0] if origin else folder, given, accept_other=accept_other_parts)
        pipeline = stack.enter_context(closing(open_run_pipeline(config, folder, source=source, objective=recipe)))
        # Build.
        mesh = make_mesh(fsdp=config.sharding.fsdp)
        steps = make_steps(program_of(config, mesh, custom), mesh)
        check_prompt(config, pipeline.tokenizer)  # refuses a blank now, not after the run
        fit, memory = announce_fit(steps.program, detect_device(), mesh)
        meter = Throughput(config, pipeline.recipe.lengths, detect_device())
        # Restore.
        keep, minutes = config.training.keep, config.training.save_every_minutes
        checkpoints = stack.enter_context(closing(Checkpoints(folder / CHECKPOINTS, keep=keep, minutes=minutes)))
        stack.enter_context(processes.together())
        progress = _restore(steps, checkpoints, pipeline)
        resumed_from = progress.step
        baselines = _announce(steps.program, pipeline)
        feed = Prefetch(pipeline, mesh, local=config.data.streams > 1)
        with stop_signals(deadline) as stopped, closing(Window(config.training.profile, folder / PROFILE)) as window:
            # Compile and check memory; only then open the record and write the config.
            if progress.step < until:
                steps = compile_steps(steps, progress.state, feed.peek().placed)
                check_fit(fit, max(steps.train_step.needed, steps.norms.needed), limit=memory)
                processes.check_same("attention", steps.program.config.model.attention)  # after the slowest compiler
            kept = progress.step - 1 if progress.branched else progress.step  # a branch writes its first row again
            writer = stack.enter_context(closing(MetricsWriter(folder, config, tracker, resume_step=kept)))
            if progress.step < until or progress.branched:
                write_config(steps.program.config, folder)
                write_parts(folder, given)
            # Loop.
            overflow = OverflowWatch(steps.program, progress.state.params, mesh=mesh)
            hooks = [*callbacks, *filter(None, [on_step])]
            run = Run(folder, pipeline, feed, steps, checkpoints, writer, overflow, meter, window, hooks, on_evaluate)
            _loop(run, progress, until=until, stopped=stopped)
        if finished := progress.step == config.training.steps:
            _finish(run, progress, baselines)
        processes.gather("finished")  # the others wait for the sample
        return Summary(progress.step, resumed_from, finished, progress.validation, folder, writer.rows())


def _last_step(config: RunConfig, stop_at: int | None) -> int:
    """The step to stop after; raises ValueError for what no run can do here."""
    training = config.training
    check_trackers(training.trackers)
    if stop_at is not None and stop_at < 1:
        raise ValueError(f"stop_at must be at least 1, got {stop_at}")
    check_rows(batch_size=training.batch_size, accumulation=training.accumulation, devices=jax.device_count())
    return training.steps if stop_at is None else min(training.steps, stop_at)


def _restore(steps: Steps, checkpoints: Checkpoints, pipeline: Pipeline) -> Progress:
    """The run's newest checkpoint, or its beginning, with the pipeline at the same place."""
    start = find_start(steps.program, checkpoints, mesh=steps.mesh, tokenizer=pipeline.tokenizer)
    if start.data is None:
        return Progress(start.state, start.step, pipeline.get_state())
    sums = {name: (total, weight) for name, (total, weight) in start.data.pop(_SUMS, {}).items()}
    pipeline.set_state(start.data)
    note = f"; {len(start.skipped)} newer ones are damaged" if start.skipped else ""
    begins = f"branching off {steps.program.config.training.branch_from} for" if start.branched else "resuming"
    _log.info("%s %s from step %d%s", begins, checkpoints.folder.parent, start.step, note)
    if start.step == steps.program.config.training.steps:
        _log.info("all %d steps are done; raise training.steps, or start a new run with training.init_from", start.step)
    return Progress(start.state, start.step, pipeline.get_state(), sums, start.branched)


def _announce(program: Program, pipeline: Pipeline) -> dict[str, float]:
    """Logs what is trained; returns the baselines."""
    family, compute = program.config.model.family, program.config.precision.compute
    size, ids = count_params(program.model) / 1e6, pipeline.tokenizer.vocab_size
    _log.info("%s, %.2fM parameters, %s in %s, tokenizer of %d", family, size, pipeline.source_name, compute, ids)
    baselines = pipeline.baselines()
    _log.info("baselines: %s", _listed(baselines))
    rule, steps = program.config.optimizer, program.config.training.steps
    shorter = phases(rule, steps=steps)
    if program.custom.optimizer is None and shorter != (rule.warmup_steps, rule.decay_steps):
        _log.info("optimizer.warmup_steps and decay_steps are shortened to %d and %d of %d steps", *shorter, steps)
    return baselines


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


def _loop(run: Run, progress: Progress, *, until: int, stopped: Callable[[], bool]) -> None:
    """Steps up to `until`, to a stop signal, or to a batch that cannot be made; saves the step that was reached."""
    failure: BatchError | None = None
    if progress.branched:  # after this save the other run's folder may be deleted
        _save(run, progress)
    evaluated = record.recorded_losses(run.folder)
    for step, loss in evaluated.items():
        run.checkpoints.evaluated(step, loss)
    try:
        if _evaluates(run, progress) and progress.step not in evaluated:  # the run ended after the save
            _evaluate(run, progress)
        run.meter.start()
        while progress.step < until and not stopped():
            _step(run, progress, until=until)
    except BatchError as error:
        if processes.several():
            raise  # the others may have their batch, and do not save this step
        failure = error
    _read(run, progress, progress.unread)
    run.checkpoints.wait()
    while progress.step not in run.checkpoints.steps():  # tries again until saves in a row have failed
        _save(run, progress)
        run.checkpoints.wait()
    if failure is not None:
        raise BatchError(f"{failure}; the run is saved at step {progress.step}") from failure
    if progress.step < run.config.training.steps:
        _log.info("stopped at step %d; the same command resumes there", progress.step)


def _step(run: Run, progress: Progress, *, until: int) -> None:
    """One step, the metrics of the step before it, and then the checkpoint and the evaluation that are due."""
    previous, progress.unread = progress.unread, _dispatch(run, progress, until=until)
    _read(run, progress, previous)
    on_time = progress.step % run.config.training.save_every == 0 or progress.step == until
    saves, evaluates = on_time or run.checkpoints.late(progress.step), _evaluates(run, progress)
    if evaluates or saves:
        _read(run, progress, progress.unread)
        progress.unread = None
    run.checkpoints.poll()
    if saves:  # first: an evaluation that fails costs no step
        _save(run, progress)
    if evaluates:
        _evaluate(run, progress)


def _evaluates(run: Run, progress: Progress) -> bool:
    """Whether the evaluation of the newest step is due."""
    training = run.config.training
    return progress.step > 0 and (progress.step % training.eval_every == 0 or progress.step == training.steps)


def _dispatch(run: Run, progress: Progress, *, until: int) -> Pending:
    """Starts the next step, and the copy of the batch after it."""
    with run.meter.waiting():
        batch, placed, progress.position = run.feed.take()
    progress.step += 1
    every, rows = run.config.training.norms_every, without_counts(placed)
    norms = run.steps.norms(progress.state, rows) if every and progress.step % every == 0 else None
    traced = functools.partial(run.window.run, progress.step, run.meter.paused)
    progress.state, metrics = traced(run.steps.train_step, progress.state, placed)
    if metrics.counts is None:
        metrics = metrics._replace(counts=record.count_rows(batch, run.pipeline.tokenizer.token_bytes).sum(0, float))
    if progress.step < until:
        with run.meter.waiting():
            run.feed.read_ahead()
    return Pending(progress.step, metrics, batch, rows, norms)


def _read(run: Run, progress: Progress, pending: Pending | None) -> None:
    """Reads the metrics of a step, if it has not been read: records them, or stops the run where they are bad."""
    if pending is None:
        return
    config = run.config
    values = jax.tree.map(lambda value: value.tolist(), jax.device_get(pending.metrics))
    skipped = values.culprit >= 0  # an overflow, which changes no parameter
    if not skipped and not (math.isfinite(values.loss) and math.isfinite(values.grad_norm)):
        start = _last_good(run, progress)
        value = run.overflow.first_value(pending.step, start.state, pending.placed, scale=values.loss_scale)
        cause = f"first non-finite value: {value} (with the parameters of step {start.step})"
        reason = f"loss {values.loss}, gradient norm {values.grad_norm}, {cause}"
        if math.isfinite(values.grad_norm):
            reason = f"check the loss, and that all targets are in the vocabulary: {reason}"
        stop(run.checkpoints.folder, start, pending.step, reason)
    with run.meter.paused():
        reason = run.overflow.check(pending.step, values, progress.state, pending.placed)
    if reason is not None:
        stop(run.checkpoints.folder, _last_good(run, progress), pending.step, reason)
    run.meter.add(pending.step, values.counts[0])
    record.add_step(progress.sums, config, values, size=values.counts[1])
    if pending.step % config.training.log_every == 0 or pending.step == 1:
        _record(run, progress, pending, values)
    if pending.norms is not None:
        run.writer.write(pending.step, norms_row(progress.state.params, pending.norms))
    report = StepReport(pending.step, values, pending.batch, lambda: jax.tree.map(jnp.copy, progress.state))
    with run.meter.paused():
        for callback in run.on_step:
            callback(report)


def _record(run: Run, progress: Progress, pending: Pending, values: StepMetrics) -> None:
    """Writes the row of a step."""
    config = run.config
    schedule = build_schedule(config.optimizer, steps=config.training.steps)
    skipped_before = int(values.skipped) - (values.culprit >= 0)
    rate = np.asarray(schedule(pending.step - 1 - skipped_before)).item()
    rate = rate if run.steps.program.custom.optimizer is None else None
    ahead = progress.unread
    if ahead and cast(Any, ahead.metrics.loss).is_ready():  # it is done, so its tokens belong to this row
        run.meter.add(ahead.step, np.asarray(ahead.metrics.counts)[0].item())
    row = record.step_row(config, values, sums=progress.sums, learning_rate=rate, speed=run.meter.read())
    progress.sums = {}
    with run.meter.paused():
        row |= run.overflow.headroom(pending.step, progress.state, pending.placed)
    run.writer.write(pending.step, row)
    log_step(config, pending.step, row)


def _evaluate(run: Run, progress: Progress) -> None:
    with run.meter.paused():
        values = evaluate(run.steps, progress.state.evaluated, run.pipeline)
        if run.on_evaluate is not None:
            more = run.on_evaluate(progress.step, values, progress.state.evaluated) or {}
            values = {name: float(value) for name, value in more.items()} | values
    progress.validation = {**values, "step": progress.step}
    run.writer.write(progress.step, {f"validation/{name}": value for name, value in values.items()})
    log_validation(progress.step, values, run.config.data.validation)
    run.checkpoints.evaluated(progress.step, values.get("loss"))


def _save(run: Run, progress: Progress) -> None:
    data = whole_position(progress.position) | ({_SUMS: dict(progress.sums)} if progress.sums else {})
    note = functools.partial(run.writer.write_fingerprint, progress.step)
    with run.meter.paused():
        run.checkpoints.save(progress.step, progress.state, data, note)


def _last_good(run: Run, progress: Progress) -> Restored:
    """The newest whole checkpoint, or the beginning, in the place of a state that is spoiled."""
    for leaf in jax.tree.leaves(progress.state):
        leaf.delete()  # a device may have no room for two states
    run.checkpoints.wait()
    tokenizer = run.pipeline.tokenizer
    return find_start(run.steps.program, run.checkpoints, mesh=run.steps.mesh, tokenizer=tokenizer)


def _finish(run: Run, progress: Progress, baselines: dict[str, float]) -> None:
    """Writes a sample of the model's text and draws the curve."""
    config, metric = run.config, run.config.model.metric
    if metric in progress.validation:
        value = progress.validation[metric]
        _log.info("validation %s %.3f (%s)", metric.replace("_", " "), value, _listed(baselines))
    params = on_one_device(run.steps.program, run.steps.mesh, progress.state.evaluated)
    if processes.index() > 0:
        return
    model = run.steps.program.model
    with optional("curve"):
        _log.info("curve in %s", plot_curve(run.folder, baselines, metric))
    with optional("sample (training.sample_prompt, sample_tokens)"):
        if text := params and write_sample(run.folder, model, params, run.pipeline, config.training):
            _log.info("sample:\n%s", text)
