"""What a person sees of a run: log lines, and on a terminal a progress bar under them."""

import contextlib
import logging
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxllm.config import RunConfig
from jaxllm.host import processes
from jaxllm.run.parts import OnStep, StepReport


def nobody_listens() -> bool:
    """Whether no handler shows lines of INFO, apart from those that libraries add at their import.

    Theirs show warnings alone: absl, by which grain and orbax log, has its own, or calls `logging.basicConfig()`.
    """

    def of_library(handler: logging.Handler) -> bool:
        plain = type(handler) is logging.StreamHandler and logging.root.level == logging.WARNING
        default = plain and getattr(handler.formatter, "_fmt", None) == logging.BASIC_FORMAT
        return default or type(handler).__module__.startswith("absl")

    return all(map(of_library, [*logging.getLogger("jaxllm").handlers, *logging.root.handlers]))


class _Lines(logging.Handler):
    """One line per message: rich's own handler makes a table of 80 columns, which wraps and pads in files and pipes."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        name = "" if processes.index() == 0 else f"process {processes.index()}: "
        self.setFormatter(logging.Formatter(f"%(asctime)s {name}%(message)s", "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else None
        # A line must not end the run: the log's disk may be full, or a signal may log while another line is written.
        with contextlib.suppress(OSError, RuntimeError):
            self._console.print(self.format(record), style=style, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def training_console(config: RunConfig) -> Iterator[OnStep]:
    """Shows the log of `jaxllm` while the block runs; yields what moves the bar at each step, for `pretrain`.

    Of several processes, the first shows it; the others show warnings, with their number, and no bar.
    """
    first = processes.index() == 0
    console = Console(soft_wrap=True)
    handler = _Lines(console)
    figures = TextColumn("loss {task.fields[loss]:.3f} {task.fields[speed]} tok/s")
    columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), figures, TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True, disable=not (first and console.is_terminal))
    task = progress.add_task("training", total=config.training.steps, loss=float("nan"), speed="-")

    def show(report: StepReport) -> None:
        steps = progress.tasks[0].speed  # per second
        speed = "-" if steps is None else f"{steps * report.metrics.weight:,.0f}"
        progress.update(task, completed=report.step, loss=report.metrics.loss, speed=speed)

    logger = logging.getLogger("jaxllm")
    before, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO if first else logging.WARNING)
    logger.propagate = False  # absl, which grain brings, would print every line again
    logger.addHandler(handler)
    try:
        with progress:
            yield show
    finally:
        logger.setLevel(before)
        logger.propagate = propagate
        logger.removeHandler(handler)
