"""What a person sees of a run: log lines, and on a terminal a progress bar under them."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxllm.config import RunConfig

_STEP = re.compile(r"step (\d+)")


class _Advance(logging.Handler):
    """Moves the bar to the step that a log line names, so that the trainer knows nothing of bars."""

    def __init__(self, progress: Progress, total: int) -> None:
        super().__init__()
        self._progress = progress
        self._task = progress.add_task("training", total=total)

    def emit(self, record: logging.LogRecord) -> None:
        found = _STEP.match(record.getMessage())
        if found:
            self._progress.update(self._task, completed=int(found.group(1)))


@contextlib.contextmanager
def training_console(config: RunConfig) -> Iterator[None]:
    """Shows the log of `jaxllm` while the block runs."""
    console = Console(soft_wrap=True)
    handlers: list[logging.Handler] = [
        RichHandler(console=console, show_path=False, show_level=False, log_time_format="%H:%M:%S", markup=False)
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    handlers.append(_Advance(progress, config.training.steps))
    logger = logging.getLogger("jaxllm")
    before, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False  # absl, which grain brings, would print every line again
    for handler in handlers:
        logger.addHandler(handler)
    try:
        with progress:
            yield
    finally:
        logger.setLevel(before)
        logger.propagate = propagate
        for handler in handlers:
            logger.removeHandler(handler)
