"""The record of a run: its speed, rows of metrics, lines of the log, a curve.

metrics.jsonl is the record; trackers (`jaxllm.run.trackers`) and the curve repeat it.
"""

import contextlib
import json
import logging
import math
import re
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.config import RunConfig
from jaxllm.data.durable import Appended, write_whole
from jaxllm.data.packing import segments_of
from jaxllm.host import processes
from jaxllm.host.device import Device
from jaxllm.models.family import train_flops
from jaxllm.run.trackers import Tracker, Trackers
from jaxllm.storage.folder import CURVE, METRICS
from jaxllm.study.pictures import COLOURS, Line, line_figure
from jaxllm.training.train_step import StepMetrics

_log = logging.getLogger(__name__)

Sums = dict[str, tuple[float, float]]  # by column: the sum of values times weights, and of weights


class Throughput:
    """Tokens per second, utilisation and the host's share of waiting for data, since the last reading."""

    def __init__(self, config: RunConfig, lengths: tuple[int, int], device: Device) -> None:
        """`lengths` are those of a row on both sides, as `Recipe.lengths`."""
        length, target_length = lengths
        batch = config.training.batch_size
        self._flops = train_flops(config.model, batch=batch, length=length, target_length=target_length)
        self._peak = None if device.flops is None else device.flops * device.count
        self._newest, self._last = 0, dict[str, float]()
        self.start()

    def start(self) -> None:
        """Begins to measure."""
        self._start = time.perf_counter()
        self._tokens = self._waited = 0.0
        self._steps = 0

    def add(self, step: int, tokens: float) -> None:
        """Counts a step once it is done, with the tokens of `count_rows`."""
        if step <= self._newest:
            return
        self._newest = step
        self._tokens += tokens
        self._steps += 1

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent here is the host waiting for data."""
        before = time.perf_counter()
        yield
        self._waited += time.perf_counter() - before

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent here (evaluation, checkpoints) is not training's."""
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before

    def read(self) -> dict[str, float]:
        """The figures since the last reading; model FLOP utilisation where the device's peak is known.

        They are the last ones again if no step has been added since.
        """
        if not self._steps:
            return self._last
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        rate, flops = self._steps / elapsed, self._flops
        values = {
            "tokens_per_second": self._tokens / elapsed,
            "tflops": rate * flops.causal / 1e12,
            "data_wait": self._waited / elapsed,
        }
        if self._peak is not None:
            work = {"mfu": flops.causal, "mfu_palm": flops.full, "mfu_6n": flops.weights}
            values |= {name: rate * done / self._peak for name, done in work.items()}
        self.start()
        self._last = values
        return values


def count_rows(batch: dict[str, np.ndarray], token_bytes: np.ndarray) -> np.ndarray:
    """For each row its tokens that are not padding, on both sides, and the bytes of the text that it predicts."""
    source = np.count_nonzero(segments_of(batch)[0], axis=1) if "encoder_tokens" in batch else 0
    tokens, size = np.count_nonzero(batch["weights"], axis=1) + source, token_bytes[batch["targets"]] * batch["weights"]
    return np.stack([tokens, size.sum(1)], axis=1, dtype=np.float32)


def add_step(sums: Sums, config: RunConfig, values: StepMetrics, *, size: float) -> None:
    """Adds a step to the sums of which a row has means, without what is not finite; `size` is its text in bytes."""
    terms = {
        "loss": (values.loss * values.weight, values.weight),
        config.model.metric: (values.nll * values.weight / math.log(2), size),
        "accuracy": (values.accuracy * values.weight, values.weight),
        "grad_norm": (values.grad_norm, 1.0),
    }
    for name, (term, weight) in terms.items():
        if math.isfinite(term):
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + term, before[1] + weight)


def step_row(
    config: RunConfig, values: StepMetrics, *, sums: Sums, learning_rate: float | None, speed: dict[str, float]
) -> dict[str, Any]:
    """The row of a training step in metrics.jsonl, without headroom: means since the last row, and the step's scales.

    Args:
        config: the run.
        values: metrics of the step, as numbers.
        sums: of the steps since the last row, as `add_step` leaves them; a mean over none is NaN.
        learning_rate: of the step, None where it is not known.
        speed: what `Throughput.read` returned.
    """
    names = ("loss", config.model.metric, "accuracy", "grad_norm")
    means = {name: total / (weight or math.nan) for name, (total, weight) in sums.items()}
    row = {name: means.get(name, math.nan) for name in names} | {"learning_rate": learning_rate, **speed}
    if config.precision.loss_scale != "none":
        row |= {"loss_scale": values.loss_scale, "skipped": values.skipped}
    return row


def log_step(config: RunConfig, step: int, row: dict[str, Any]) -> None:
    """Shows the row of a training step."""
    names = ("loss", config.model.metric, "grad_norm", "tokens_per_second")
    loss, size, norm, speed = (row[name] for name in names)
    unit = "target" if config.model.encoder_decoder else "byte"
    rate = "" if row["learning_rate"] is None else f" lr {row['learning_rate']:.1e}"
    rounded = f"{speed / 1000:.0f}k" if speed >= 10_000 else f"{speed:.0f}"
    text = "step %d loss %.3f bits/%s %.3f grad %.2f%s %s tok/s"  # 80 columns, with the time before it
    _log.info(text, step, loss, unit, size, norm, rate, rounded)


def log_validation(step: int, values: dict[str, float], sets: Collection[str] = ()) -> None:
    """Shows an evaluation: a line for each set of data.validation, and one for values that belong to none."""
    pairs = [(key.rpartition("/"), x) for key, x in values.items()]
    lines = {f"{name}: ": {key[2]: x for key, x in pairs if key[0] == name} for name in sets}
    first = next(iter(lines.values()), {})
    lines[""] = {key: x for key, x in values.items() if key not in first and key.split("/")[0] not in sets}
    for name, line in lines.items():
        listed = " ".join(f"{key.replace('bits_per_', 'bits/').replace('_', ' ')} {x:.4f}" for key, x in line.items())
        if listed:
            _log.info("step %d validation %s%s", step, name, listed)


class MetricsWriter:
    """Appends dictionaries of scalars to metrics.jsonl, and gives them to the trackers; the first process does."""

    def __init__(
        self, folder: Path, config: RunConfig | None = None, tracker: Tracker | None = None, *, resume_step: int
    ) -> None:
        """Drops lines after `resume_step`: those steps are about to be done again."""
        self.path, self._writes = folder / METRICS, processes.index() == 0
        if not self._writes:
            return
        kept = []
        if self.path.exists():
            kept = [row for row in read_metrics(self.path) if row["step"] <= resume_step]
            text = "".join(json.dumps(row) + "\n" for row in kept)
            if text.encode() != self.path.read_bytes():
                write_whole(self.path, text.encode())  # a full disk or a kill costs no row of a step that stays done
        self._fingerprinted = max((row["step"] for row in kept if "fingerprint" in row), default=-1)
        self._file = Appended(self.path)
        self._trackers = Trackers(folder, config, kept, tracker)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Records values at a step; numbers that are not finite become null in JSON."""
        if not self._writes:
            return
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in values.items()}
        self._file.write(f"{json.dumps({'step': step, **finite})}\n".encode())
        self._trackers.write(step, finite)

    def write_fingerprint(self, step: int, fingerprint: str) -> None:
        """Records the fingerprint of a state before its checkpoint; once per step, also where it is saved again."""
        if self._writes and step > self._fingerprinted:
            self._fingerprinted = step
            self.write(step, {"fingerprint": fingerprint})
            self._file.sync()  # no checkpoint is on disk before the rows of its steps

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far; none on other processes than the first."""
        return read_metrics(self.path) if self._writes else []

    def close(self) -> None:
        """Closes the record and the trackers."""
        if self._writes:
            self._file.close()
            self._trackers.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; damaged lines, such as a last one cut off by a crash, are left out with a warning."""
    rows, damaged = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            row = json.loads(line.decode()) if line else None
        except (ValueError, RecursionError):
            row = {}
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
        elif line:
            damaged.append(number)
    if damaged:
        _log.warning("%s: %d damaged lines are left out: %s", path, len(damaged), ", ".join(map(str, damaged)))
    return rows


def recorded_losses(folder: Path) -> dict[int, float | None]:
    """Validation losses by step, as the first process reads them in metrics.jsonl."""
    rows = read_metrics(folder / METRICS) if processes.index() == 0 else []
    losses = [(row["step"], row["validation/loss"]) for row in rows if "validation/loss" in row]
    return dict(json.loads(processes.gather(json.dumps(losses))[0]))


def plot_curve(folder: Path, baselines: dict[str, float], name: str = "bits_per_byte") -> Path:
    """Draws `name` of training and validation over steps from metrics.jsonl, with baselines, into loss.png."""
    runs_figure({folder.name: read_metrics(folder / METRICS)}, name, baselines).savefig(folder / CURVE, dpi=130)
    return folder / CURVE


def runs_figure(runs: Mapping[str, list[dict[str, Any]]], name: str, levels: Mapping[str, float] | None = None) -> Any:
    """A figure of the column `name` in the rows of runs; ValueError for a run that has no value of it."""
    lines: list[Line] = []
    for run, rows in runs.items():
        first, keys = len(lines), dict.fromkeys(key for row in rows for key in row)
        sets = [key for key in keys if re.fullmatch(rf"validation/[^/]+/{re.escape(name)}", key)]
        for key in [*(sets or [f"validation/{name}"]), name]:
            values = {row["step"]: row[key] for row in rows if isinstance(row.get(key, ""), int | float | None)}
            y = np.array([*values.values()], float)  # None is NaN, a gap
            if np.isfinite(y).any():
                pale, end = key == name and len(lines) > first, y[np.isfinite(y)][-1]
                kind = key.split("/")[:-1] or ["training"]
                text = f"{' '.join([run, *kind[1:]] if len(runs) > 1 else kind)} {end:.{4 if abs(end) < 1e4 else 9}g}"
                look: dict[str, Any] = {"alpha": 0.4} if pale else {"marker": "o", "markersize": 3}
                look["color"] = COLOURS[(first if pale else len(lines)) % len(COLOURS)]
                lines.append(("" if pale and len(runs) > 1 else text, list(values), y, look))
        if first == len(lines):
            raise ValueError(f"{run} has no value of {name}; its columns are {', '.join(keys)}")
    for (label, value), style in zip((levels or {}).items(), ("--", ":", "-."), strict=False):
        lines.append((f"{label} {value:.4g}", [0, lines[0][1][-1]], [value] * 2, {"color": "gray", "linestyle": style}))
    pale = max((np.nanmax(y) for _, _, y, look in lines if "alpha" in look), default=0)
    high = 1.5 * max(np.nanmax(y) for _, _, y, look in lines if "alpha" not in look)
    legend = "validation with points, training pale" if pale else ""
    title = next(iter(runs)) if len(runs) == 1 else legend
    unit = "loss (nats per token)" if name == "loss" else name.replace("_", " ")
    top = high if pale > high else None  # the first steps of training, far above, would flatten the rest
    return line_figure(lines, x="step", y=unit, title=title, log=name == "loss_scale", top=top)
