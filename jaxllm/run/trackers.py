"""Trackers: what also gets the rows of metrics.jsonl, such as TensorBoard and W&B.

metrics.jsonl is the record. A tracker that raises is dropped with a warning, and the run continues without it. Only the
first process has trackers. TensorBoard's file is made again from metrics.jsonl at each start, and W&B gets the rows
that its run lacks, so that a resume or a tracker that is chosen late repeats and hides nothing.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxllm.config import RunConfig
from jaxllm.config.file import ConfigError
from jaxllm.data import first_line
from jaxllm.data.durable import write_whole
from jaxllm.storage.folder import TENSORBOARD, WANDB_ID

_log = logging.getLogger(__name__)

Row = Mapping[str, Any]  # of metrics.jsonl, without its step: numbers, None for one that is not finite, and text
Tracker = Callable[[int, Row], None]  # gets the step and the row
_Opened = tuple[Tracker, Callable[[], None]]  # a tracker, and what ends it
_PREFIX = "events.out.tfevents."


def _tensorboard(folder: Path, _: Any) -> _Opened:
    """Writes one event file, which replaces those of earlier starts."""
    # Not SummaryWriter, whose thread blocks its caller for ever once the disk is full (tensorboardX 2.6.5).
    from tensorboardX import RecordWriter

    # Modules that protobuf makes when they are imported, so that no type checker can read their names.
    events, summaries = (importlib.import_module(f"tensorboardX.proto.{name}_pb2") for name in ("event", "summary"))

    place, stamp = folder / TENSORBOARD, int(time.time())
    place.mkdir(exist_ok=True)
    for older in place.glob(f"{_PREFIX}*"):
        # A running TensorBoard looks for names after the last one that it has read, and a clock can be set back.
        stamp = max([stamp, *(int(part) + 1 for part in older.name.split(".")[3:4] if part.isdecimal())])
        older.unlink()
    file = RecordWriter(str(place / f"{_PREFIX}{stamp:010d}.{os.uname().nodename}"))

    def record(event: Any) -> None:
        file.write(event.SerializeToString())
        file.flush()

    def track(step: int, row: Row) -> None:
        values = [summaries.Summary.Value(tag=name, simple_value=number) for name, number in _numbers(row).items()]
        record(events.Event(wall_time=time.time(), step=step, summary=summaries.Summary(value=values)))

    record(events.Event(file_version="brain.Event:2"))
    started = events.SessionLog(status=events.SessionLog.START)  # voids what a running TensorBoard has read
    record(events.Event(step=0, session_log=started))
    return track, file.close


def _wandb(folder: Path, config: Any) -> _Opened:
    """Logs to one W&B run per run folder; WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE and so on are W&B's own."""
    import wandb

    file = folder / WANDB_ID
    if not file.exists():
        write_whole(file, uuid.uuid4().hex[:8].encode())
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "jaxllm"),
        name=os.environ.get("WANDB_NAME", folder.resolve().name),
        id=file.read_text(encoding="utf-8"),
        resume="allow",
        dir=str(folder),
        config=dataclasses.asdict(config),
    )

    def track(step: int, row: Row) -> None:
        if step >= run.step:  # a resume repeats steps, with the same numbers
            run.log(_numbers(row), step=step)

    return track, run.finish


def _numbers(row: Row) -> dict[str, int | float]:
    return {name: value for name, value in row.items() if isinstance(value, int | float)}


# `training.trackers` -> what opens it, and the library for that.
_KNOWN = {"tensorboard": (_tensorboard, "tensorboardX"), "wandb": (_wandb, "wandb")}


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError for a tracker whose library is not installed, with the command that installs it."""
    for name in names:
        if importlib.util.find_spec(library := _KNOWN[name][1]) is None:
            raise ConfigError(f"training.trackers has {name}, which needs {library}: pip install {library}")


class Trackers:
    """The trackers of a run: those of `training.trackers`, and `custom`, which gets only new rows."""

    def __init__(self, folder: Path, config: RunConfig | None, rows: Sequence[Row], custom: Tracker | None) -> None:
        """Gives the rows of the steps that are done to those of the config."""
        self._open: dict[str, _Opened] = {}
        for name in config.training.trackers if config else ():
            with self._dropping(name):
                self._open[name] = _KNOWN[name][0](folder, config)
        for row in rows:
            self.write(row["step"], {name: value for name, value in row.items() if name != "step"})
        if custom is not None:
            self._open["given to pretrain"] = custom, lambda: None

    def write(self, step: int, row: Row) -> None:
        """Gives them a row."""
        for name, (track, _) in list(self._open.items()):
            with self._dropping(name):
                track(step, row)

    def close(self) -> None:
        """Ends them."""
        for name, (_, end) in list(self._open.items()):
            with self._dropping(name):
                end()

    @contextlib.contextmanager
    def _dropping(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any library or of the caller
            _log.warning("the tracker %s is dropped, and the run continues without it: %s", name, first_line(error))
            if opened := self._open.pop(name, None):
                with contextlib.suppress(Exception):  # it may hold a file whose disk is full
                    opened[1]()
