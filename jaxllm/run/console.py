"""What a person sees of a run: log lines, and on a terminal a progress bar under them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxllm.config import RunConfig
from jaxllm.run import processes


@contextlib.contextmanager
def training_console(config: RunConfig) -> Iterator[Callable[[int], None]]:
    """Shows the log of `jaxllm` while the block runs; yields what moves the bar to a step, for `pretrain`.

    Of several processes, the first shows it; the others show warnings, with their number, and no bar.
    """
    first = processes.index() == 0
    console = Console(soft_wrap=True)
    handler = RichHandler(console=console, show_path=False, show_level=False, log_time_format="%H:%M:%S", markup=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True, disable=not (first and console.is_terminal))
    task = progress.add_task("training", total=config.training.steps)
    logger = logging.getLogger("jaxllm")
    before, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO if first else logging.WARNING)
    if not first:
        handler.setFormatter(logging.Formatter(f"process {processes.index()}: %(message)s"))
    logger.propagate = False  # absl, which grain brings, would print every line again
    logger.addHandler(handler)
    try:
        with progress:
            yield lambda step: progress.update(task, completed=step)
    finally:
        logger.setLevel(before)
        logger.propagate = propagate
        logger.removeHandler(handler)
