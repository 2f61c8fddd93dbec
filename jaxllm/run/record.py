"""Floating-point work of a model, and the record of a run (JSONL, TensorBoard, a PNG).

JSONL is the record; everything else can be made from it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from jaxllm.config import ModelConfig
from jaxllm.models.family import FAMILIES
from jaxllm.models.flops import Flops
from jaxllm.run.event_file import EventFile


def train_flops(config: ModelConfig, *, batch: int, length: int, target_length: int = 0) -> Flops:
    """Work of forward and backward on `batch` rows of `length` (and `target_length`) tokens."""
    return FAMILIES[config.family].flops(config, batch, length, target_length)


class MetricsWriter:
    """Appends dictionaries of scalars to metrics.jsonl and to TensorBoard, flushed line by line."""

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        """Drops lines after `resume_step`: those steps are about to be done again."""
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            kept = [row for row in read_metrics(self.path) if row["step"] <= resume_step]
            text = "".join(json.dumps(row) + "\n" for row in kept)
            if text.encode() != self.path.read_bytes():
                # Written next to it first: no disk that is full, no kill may cost the rows of steps that stay done.
                partial = self.path.with_suffix(".partial")
                partial.write_text(text, encoding="utf-8")
                partial.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = EventFile(folder / "tensorboard", resume_step=resume_step)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Records values at a step; numbers that are not finite become null in JSON."""
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        self._board.write(step, {name: value for name, value in finite.items() if isinstance(value, int | float)})

    def close(self) -> None:
        """Flushes and closes both records."""
        self._file.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line cut off by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def plot_curve(folder: Path, *, baselines: dict[str, float], name: str = "bits_per_byte") -> Path:
    """Draws the metric `name` of training and validation over steps from metrics.jsonl into loss.png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(folder / "metrics.jsonl")
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, marker in ((name, "training", None), (f"validation/{name}", "validation", "o")):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=3)
    for (label, value), style in zip(baselines.items(), ("--", ":", "-."), strict=False):
        axes.axhline(value, color="gray", linestyle=style, linewidth=1, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel(name.replace("_", " "))
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    figure.savefig(folder / "loss.png", dpi=130)
    return folder / "loss.png"
