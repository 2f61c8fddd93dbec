"""What `pretrain` returns and gives to callbacks, and how a run folder records the parts that its caller gives.

parts.json has the name of each part, with a hash of its source code where Python finds one. A run that was trained with
some parts is not continued with others, unless the caller accepts them.
"""

import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxllm.data.durable import write_whole
from jaxllm.data.sources import Source
from jaxllm.host import processes
from jaxllm.storage.folder import RunFolderError, has_begun
from jaxllm.training.program import CustomParts
from jaxllm.training.train_step import StepMetrics, TrainState

_log = logging.getLogger(__name__)

PARTS = "parts.json"


class StepReport(NamedTuple):
    """The argument of `on_step`, while the next step runs on the device.

    Attributes:
        step: optimizer steps done, this one included.
        metrics: of this step, as numbers.
        batch: NumPy arrays of this step; with data.streams, the rows of this process.
        state: returns a copy of the newest state on its devices, which is up to one step later: see `state().step`. It
            waits for that step and needs memory for a second state.
    """

    step: int
    metrics: StepMetrics
    batch: dict[str, np.ndarray]
    state: Callable[[], TrainState]


class Summary(NamedTuple):
    """The result of a call of `pretrain`.

    Attributes:
        step: optimizer steps done in total.
        resumed_from: step at which the call started, 0 for a new run.
        finished: whether the last step was reached.
        validation: the newest evaluation and its step, as `evaluate`; empty without one.
        folder: the run folder.
        metrics: all rows of metrics.jsonl, earlier sessions included; empty on other processes than the first.
    """

    step: int
    resumed_from: int
    finished: bool
    validation: dict[str, float]
    folder: Path
    metrics: list[dict[str, Any]]


OnStep = Callable[[StepReport], None]
# (step, metrics of the evaluation, parameters, which the next step overwrites) -> more metrics, or None.
OnEvaluate = Callable[[int, dict[str, float], Any], Mapping[str, float] | None]


def describe_parts(custom: CustomParts, source: Source | None) -> dict[str, str]:
    """The given parts by name; empty where the config describes the whole run."""
    functions: dict[str, Any] = {"optimizer": custom.optimizer and custom.optimizer.update, "loss": custom.loss}
    functions |= {"model": custom.model, "recipe": custom.recipe and custom.recipe.recipe}
    described = {name: _described(name, function) for name, function in functions.items() if function is not None}
    return described if source is None else {**described, "source": source.name}


def check_parts(folder: Path, parts: Mapping[str, str], *, accept_other: bool) -> None:
    """Compares parts with those that trained the run so far.

    Raises:
        RunFolderError: naming the parts that differ, unless `accept_other`.
    """
    if accept_other or not has_begun(folder):
        return
    file = folder / PARTS
    try:
        before = dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}
    except (ValueError, TypeError):
        raise RunFolderError(f"{file} is damaged; pass accept_other_parts=True, which writes it again") from None
    names = sorted(before.keys() | parts.keys())
    differing = [
        f"{name}: {before.get(name, 'of the config')} -> {parts.get(name, 'of the config')}"
        for name in names
        if before.get(name) != parts.get(name)
    ]
    if differing:
        listed = "\n  ".join(differing)
        raise RunFolderError(
            f"{folder} holds a run with other parts (there -> here):\n  {listed}\nresume it with the same arguments of "
            f"pretrain, pass accept_other_parts=True, or choose another training.run_dir"
        )


def write_parts(folder: Path, parts: Mapping[str, str]) -> None:
    """Records the parts of a run, by the first process; removes the record of a run that has none any more."""
    file = folder / PARTS
    if processes.index() > 0:
        return
    if parts:
        write_whole(file, json.dumps(parts, indent=1).encode())
    else:
        file.unlink(missing_ok=True)


def _described(name: str, part: Any) -> str:
    function = inspect.unwrap(getattr(part, "func", part))
    label = f"{function.__module__}.{getattr(function, '__qualname__', type(function).__name__)}"
    if name != "optimizer":  # the source of an optax rule has none of its numbers
        try:
            return f"{label} sha256:{hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]}"
        except (OSError, TypeError):
            pass
    _log.info("%s %s is recorded by its name alone: a change of its numbers is not noticed at a resume", name, label)
    return label
