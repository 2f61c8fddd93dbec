"""The host loop: moves time, and does nothing that a pure function could.

Step n is dispatched before the metrics of step n-1 are read, and batch n+1 is copied to the device while it runs, so
that the device never waits for the host. A stop signal is answered between steps, with a checkpoint. A loss that is
not finite, or a loss scale that can't shrink any more, stops the run before anything is saved.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from jaxllm.config import RunConfig
from jaxllm.data.packing import segments_of
from jaxllm.data.pipeline import Pipeline, open_run_pipeline
from jaxllm.data.tokenizer import encode_blanks
from jaxllm.models import count_params
from jaxllm.run.checkpoint import Checkpoints, Restored
from jaxllm.run.compiled import explained
from jaxllm.run.device import compilation_cache, detect_device
from jaxllm.run.fit import announce_fit
from jaxllm.run.folder import open_run_folder, settle_residual, write_config
from jaxllm.run.overflow import OverflowWatch
from jaxllm.run.prefetch import Prefetch
from jaxllm.run.record import MetricsWriter, plot_curve
from jaxllm.run.samples import write_sample
from jaxllm.run.start import load_initial_params
from jaxllm.run.steps import Steps
from jaxllm.run.throughput import Throughput
from jaxllm.training.optimizer import build_schedule
from jaxllm.training.sharding import check_rows, make_mesh, place_rows, state_shardings, with_shardings
from jaxllm.training.train_step import (
    StepMetrics,
    TrainState,
)

_log = logging.getLogger(__name__)


class TrainingStopped(RuntimeError):
    """Training cannot continue; the message names the step and the last good checkpoint."""


class Summary(NamedTuple):
    """What a call of `pretrain` did.

    Attributes:
        step: optimizer steps done in total.
        resumed_from: step it started at, 0 for a new run.
        finished: whether the last step was reached.
        validation: last evaluation: loss, bits_per_byte (T5: bits_per_target_byte, spans_exact), accuracy.
        folder: the run folder.
    """

    step: int
    resumed_from: int
    finished: bool
    validation: dict[str, float]
    folder: Path


def pretrain(config: RunConfig, *, stop_at: int | None = None) -> Summary:
    """Trains, or continues training, the run of `config.training.run_dir`.

    Args:
        config: the run.
        stop_at: save and return after this step, for sessions of limited length.

    Raises:
        ValueError (ConfigError, DataError, FitError), CheckpointError, DeviceError: before training, naming the value
            and the fix; config, tokenizer and checkpoints of the folder are then as they were.
        TrainingStopped: when the loss is not finite, or gradients overflow whatever the loss scale.
    """
    training = config.training
    if stop_at is not None and stop_at < 1:
        raise ValueError(f"stop_at must be at least 1, got {stop_at}")
    check_rows(batch_size=training.batch_size, accumulation=training.accumulation, devices=jax.device_count())
    until = training.steps if stop_at is None else min(training.steps, stop_at)
    config = settle_residual(config)
    with (
        compilation_cache(training.compilation_cache),
        open_run_folder(config) as folder,
        contextlib.closing(open_run_pipeline(config, folder)) as pipeline,
        contextlib.closing(_Run(config, folder, pipeline)) as run,
    ):
        with _stop_signals() as stopped:
            if run.step < until:
                run.compile()
            run.train(until=until, stopped=stopped)
        if run.step == training.steps:
            run.finish()
        return Summary(run.step, run.resumed_from, run.step == training.steps, run.validation, folder)


class _Pending(NamedTuple):
    """A dispatched step whose metrics have not been read."""

    step: int
    metrics: StepMetrics
    batch: dict[str, np.ndarray]


class _Run:
    """State of the host: everything a step needs, made once."""

    def __init__(self, config: RunConfig, folder: Path, pipeline: Pipeline) -> None:
        self.config, self.folder, self.pipeline = config, folder, pipeline
        training = config.training
        self._mesh = mesh = make_mesh()
        self.schedule = build_schedule(config.optimizer, steps=training.steps)
        self.steps = Steps(config, pipeline.tokenizer, mesh=mesh, check=self._begin)
        self._bits = config.model.metric
        if config.model.encoder_decoder and training.sample_tokens:
            # A blank that the tokenizer lacks is better found now than at the end.
            encode_blanks(training.sample_prompt, pipeline.tokenizer)
        self._check_fit = announce_fit(self.steps.program, detect_device())
        self.checkpoints = Checkpoints(folder / "checkpoints", keep=training.keep)
        self.validation: dict[str, float] = {}
        self.resumed_from = 0
        self.state = self._initial_state()
        self.step = self.resumed_from
        self._batches, self._position = Prefetch(pipeline, mesh), pipeline.get_state()
        self.overflow = OverflowWatch(config, self.state.params, mesh=mesh)
        self.writer = MetricsWriter(folder, resume_step=self.step)
        self.baselines = pipeline.baselines()
        self._meter = Throughput(config, pipeline.recipe.lengths)
        _log.info(
            "%s, %.2fM parameters, %s in %s, tokenizer of %d",
            config.model.family,
            count_params(self.steps.program.model) / 1e6,
            pipeline.source_name,
            config.precision.compute,
            pipeline.tokenizer.vocab_size,
        )
        _log.info("baselines: %s", ", ".join(f"{k} {v:.3f}" for k, v in self.baselines.items()))

    def _begin(self, needed: int) -> None:
        """The step is compiled: the last that can refuse the run, and then the folder is its."""
        if self._check_fit is not None:
            self._check_fit(needed)
        write_config(self.steps.program.config, self.folder)

    def compile(self) -> None:
        """Settles the path of attention, where a library could refuse it, before the first step."""
        self.steps.compile(self.state, lambda: self._batches.read_ahead().placed)
        if self.steps.program.config != self.config:
            self.config = self.steps.program.config
            self.overflow = OverflowWatch(self.config, self.state.params, mesh=self._mesh)

    def _initial_state(self) -> TrainState:
        with explained("initial state"):
            state, restored = self._newest_state()
        if restored is not None:
            self.resumed_from = restored.step
            self.pipeline.set_state(restored.data)
            note = f"; {len(restored.skipped)} newer damaged ones set aside" if restored.skipped else ""
            _log.info("resuming %s from step %d%s", self.folder, restored.step, note)
        return state

    def _newest_state(self) -> tuple[TrainState, Restored | None]:
        """The state of the newest checkpoint, or the one that the run starts from."""
        program, mesh = self.steps.program, self._mesh
        abstract = program.abstract_state()
        restored = self.checkpoints.restore(with_shardings(abstract, mesh))
        layout = None if mesh is None else state_shardings(abstract, mesh)
        if restored is None and self.config.training.init_from:
            params = load_initial_params(
                self.config.training.init_from, program.model, tokenizer=self.pipeline.tokenizer
            )
            if mesh is not None:
                params = jax.device_put(params, state_shardings(params, mesh))
            return jax.jit(program.state_of, out_shardings=layout)(params), None
        if restored is None:
            return jax.jit(program.fresh_state, out_shardings=layout)(), None
        return restored.state, restored

    def train(self, *, until: int, stopped: Callable[[], bool]) -> None:
        """Steps up to `until`, or to the next step border after a stop signal, and saves there."""
        training = self.config.training
        pending: _Pending | None = None
        saved = self.step if self.resumed_from else -1
        while self.step < until and not stopped():
            with self._meter.waiting():
                batch, placed, self._position = self._batches.take()
            self.state, metrics = self.steps.train_step(self.state, placed)
            self.step += 1
            if self.step < until:
                with self._meter.waiting():
                    self._batches.read_ahead()
            previous, pending = pending, _Pending(self.step, metrics, batch)
            if previous is not None:
                self._record(previous)
            evaluate, save = self.step % training.eval_every == 0, self.step % training.save_every == 0
            if evaluate or save or self.step == until:
                self._record(pending)
                pending = None
            if evaluate or self.step == training.steps:
                self._evaluate()
            if save:
                saved = self._save()
        if pending is not None:
            self._record(pending)
        if self.step > saved:
            self._save()
        self.checkpoints.wait()
        if self.step < training.steps:
            _log.info("stopped at step %d; the same command goes on from there", self.step)

    def _save(self) -> int:
        loss = self.validation.get("loss") if self.validation.get("step") == self.step else None
        self.checkpoints.save(self.step, self.state, self._position, validation_loss=loss)
        return self.step

    def _bytes(self, batch: dict[str, np.ndarray]) -> float:
        return float(np.sum(self.pipeline.tokenizer.token_bytes[batch["targets"]] * batch["weights"]))

    def _record(self, pending: _Pending) -> None:
        values = StepMetrics(*(value.item() for value in jax.device_get(pending.metrics)))
        scaling = self.config.precision.loss_scale != "none"
        if not scaling and not (math.isfinite(values.loss) and math.isfinite(values.grad_norm)):
            self._stop(pending.step, f"loss {values.loss}, gradient norm {values.grad_norm}, {self._culprit(pending)}")
        with self._meter.paused():
            reason = self.overflow.check(pending.step, values, self.state, pending.batch)
        if reason is not None:
            self._stop(pending.step, reason)
        self._meter.add(_tokens(pending.batch))
        if pending.step % self.config.training.log_every and pending.step != 1:
            return
        row = {
            "loss": values.loss,
            self._bits: values.nll * values.weight / math.log(2) / max(self._bytes(pending.batch), 1.0),
            "accuracy": values.accuracy,
            "grad_norm": values.grad_norm,
            "learning_rate": np.asarray(self.schedule(pending.step - 1 - int(values.skipped))).item(),
            **self._meter.read(),
        }
        if scaling:
            row |= {"loss_scale": values.loss_scale, "skipped": values.skipped}
        with self._meter.paused():
            row |= self.overflow.headroom(pending.step, self.state, pending.batch)
        self.writer.write(pending.step, row)
        _log.info(
            "step %d/%d  loss %.4f  bits/byte %.3f  grad %.2f  lr %.2e  %d tok/s",
            pending.step,
            self.config.training.steps,
            row["loss"],
            row[self._bits],
            row["grad_norm"],
            row["learning_rate"],
            row["tokens_per_second"],
        )

    def _culprit(self, pending: _Pending) -> str:
        """Where the step first left the finite numbers, by computing its batch again.

        Without a loss scale nothing is skipped, so that its own parameters are spoiled: the last checkpoint's are next.
        """
        del self.state  # room for the other
        self.checkpoints.wait()
        state, restored = self._newest_state()
        value = self.overflow.first_value(pending.step, state, pending.batch)
        return f"first non-finite value: {value} (with the parameters of step {restored.step if restored else 0})"

    def _stop(self, step: int, reason: str) -> NoReturn:
        good = self._last_good()
        again = "anew" if good is None else f"anew or with training.init_from={self.folder}"
        raise TrainingStopped(
            f"{reason} at step {step}; the last good checkpoint is {good or 'none yet'}. Lower "
            f"optimizer.learning_rate, lengthen warmup_steps or tighten clip_norm, and start another training.run_dir, "
            f"{again}"
        )

    def _last_good(self) -> str | None:
        self.checkpoints.wait()
        steps = self.checkpoints.steps()
        return f"step {steps[-1]} in {self.checkpoints.folder}" if steps else None

    def _evaluate(self) -> None:
        with self._meter.paused():
            self.validation = {"step": self.step, **self.evaluate()}
        row = {f"validation/{k}": v for k, v in self.validation.items() if k != "step"}
        self.writer.write(self.step, row)
        shown = "  ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in self.validation.items() if k != "step")
        _log.info("step %d  validation %s", self.step, shown)

    def evaluate(self) -> dict[str, float]:
        """Loss per token, bits per byte, accuracy and T5's spans on the first validation batches, always the same."""
        self.steps.spans.reset()
        nll = weight = correct = size = 0.0
        for batch in self.pipeline.validation(self.config.training.eval_batches):
            placed = place_rows(batch, self._mesh)
            sums = jax.device_get(self.steps.eval_step(self.state.params, placed))
            nll, weight, correct = (
                nll + float(sums.nll),
                weight + float(sums.weight),
                correct + float(sums.correct),
            )
            size += self._bytes(batch)
            self.steps.spans.add(self.state.params, batch, placed)
        weight = max(weight, 1.0)
        return {
            "loss": nll / weight,
            self._bits: nll / math.log(2) / max(size, 1.0),
            "accuracy": correct / weight,
            **self.steps.spans.result(),
        }

    def finish(self) -> None:
        """Writes a sample of what the model says and draws the curve."""
        if self._bits in self.validation:
            compared = ", ".join(f"{name} {value:.3f}" for name, value in self.baselines.items())
            _log.info("validation %s %.3f (%s)", self._bits.replace("_", " "), self.validation[self._bits], compared)
        # Decoding is for one device: a few tokens are not worth a layout of their own.
        params = self.state.params if self._mesh is None else jax.device_put(self.state.params, jax.devices()[0])
        text = write_sample(self.folder, self.steps.program.model, params, self.pipeline, self.config.training)
        if text:
            _log.info("sample:\n%s", text)
        try:
            curve = plot_curve(self.folder, baselines=self.baselines, name=self._bits)
            _log.info("curve in %s, everything else beside it", curve)
        except ModuleNotFoundError as error:  # a finished run must not fail for a picture
            _log.warning("no curve is drawn: %s; its numbers are in metrics.jsonl", error)

    def close(self) -> None:
        """Waits for checkpoints and closes the records."""
        if hasattr(self, "writer"):
            self.writer.close()
        self.checkpoints.close()


def _tokens(batch: dict[str, np.ndarray]) -> float:
    """Tokens that are not padding, on both sides of an encoder-decoder."""
    source = np.count_nonzero(segments_of(batch)[0]) if "encoder_tokens" in batch else 0
    return float(np.count_nonzero(batch["weights"]) + source)


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Turns the first SIGTERM or Ctrl-C into a flag; a second one acts as usual."""
    received: list[int] = []
    try:
        previous: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def handle(number: int, _: Any) -> None:
            received.append(number)
            signal.signal(number, previous[number])
            _log.info("%s: saving after this step, then leaving", signal.Signals(number).name)

        for number in previous:
            signal.signal(number, handle)
    except ValueError:  # not in the main thread: the caller owns the signals
        previous = {}
    try:
        yield lambda: bool(received)
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
