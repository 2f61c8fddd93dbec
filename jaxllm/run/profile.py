"""Where the time of a step goes: traces of jax.profiler, and their kernels, read without TensorFlow.

A trace has every kernel with its duration. Kernels that differ only in their number or layer are added up, and each is
named by its operation in jax, from the trace or from the text of the compiled program. XLA runs no CUDA graphs
while a trace is recorded, so a step that is not traced has the same kernels and smaller gaps between them.
"""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData

from jaxllm.host import processes
from jaxllm.run.compiled import CompiledOnce

_log = logging.getLogger(__name__)

Paused = Callable[[], AbstractContextManager[None]]  # its time is not that of training
OPTIONS = jax.profiler.ProfileOptions()
OPTIONS.python_tracer_level = 0


class Kernel(NamedTuple):
    """Kernels of one kind."""

    name: str  # XLA's or the library's, without its number
    where: str  # the operation of jax, without the number of its layer; empty where nothing names it
    milliseconds: float  # of one step
    calls: float  # in one step
    fraction: float  # of the time of all kernels


class Profile(NamedTuple):
    """The time of the first GPU or, without a GPU, of the threads of XLA:CPU."""

    step_milliseconds: float  # from the first kernel of the trace to the end of its last, for one step
    busy: float  # fraction of that in which a kernel ran
    kernels: list[Kernel]  # largest first

    def table(self, most: int) -> str:
        """The largest kernels as text."""
        lines = [f"{self.step_milliseconds:.3f} ms a step, {self.busy:.1%} of it in kernels; {len(self.kernels)} kinds"]
        for name, where, time, calls, fraction in self.kernels[:most]:
            lines.append(f"{time:9.3f} ms {calls:7.1f}x {fraction:6.1%}  {name[:60]:24} {where[-90:]}")
        return "\n".join(lines)


def kernels(folder: str | Path, steps: int, *, program: str = "") -> Profile:
    """The profile of the newest trace in a folder, of so many steps; `program` is the text of the compiled step.

    Raises:
        ValueError: without a trace, or without one of a device.
    """
    files = sorted(Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise ValueError(f"no trace (*.xplane.pb) in {folder}")
    kinds: dict[tuple[str, str], list[float]] = {}
    covered, begin, until = 0.0, float("inf"), float("-inf")
    for start, end, name, where in sorted(_events(ProfileData.from_file(str(files[-1])), sources(program))):
        kinds.setdefault((kind(name), re.sub(r"\d+", "*", where)), []).append(end - start)
        covered += max(0.0, end - max(start, until))
        begin, until = min(begin, start), max(until, end)
    if not kinds:
        raise ValueError(f"{files[-1]} holds no kernel")
    total = sum(map(sum, kinds.values()))
    found = [Kernel(*names, sum(x) / 1e6 / steps, len(x) / steps, sum(x) / total) for names, x in kinds.items()]
    found.sort(key=lambda each: -each.milliseconds)
    return Profile((until - begin) / 1e6 / steps, covered / (until - begin), found)


def kind(name: str) -> str:
    """A kernel's name without the numbers at its end."""
    return re.sub(r"([._]\d+)+$", "", name)


def sources(program: str) -> dict[str, str]:
    """Operation of jax by the name that XLA gave to its kernel, from the text of a compiled program."""
    found = re.findall(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name=\"([^\"]*)\"", program, re.MULTILINE)
    # In a CUDA graph a kernel may be known by its function alone, which has no dots.
    return {name.replace(".", "_"): where for name, where in found} | dict(found)


def _events(data: Any, known: dict[str, str]) -> Iterator[tuple[float, float, str, str]]:
    """(start, end, name, operation) of the first GPU's streams, or XLA:CPU's threads; a CUDA graph has no operation."""
    planes = sorted(data.planes, key=lambda plane: plane.name)
    gpus = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for line in (line for plane in gpus[:1] or planes for line in plane.lines):
        for event in line.events if line.name.startswith("Stream") or not gpus else ():
            stats = {str(key): value for key, value in event.stats if not str(value).startswith("command_buffer")}
            if gpus or "hlo_op" in stats:
                name = str(stats.get("hlo_op") or event.name)
                where = known.get(name) or str(stats.get("name") or stats.get("tf_op") or "")
                yield event.start_ns, event.start_ns + event.duration_ns, name, where


class Window:
    """Traces the steps of `training.profile` into a folder, and shows their largest kernels in the log."""

    def __init__(self, steps: tuple[int, ...] | None, folder: Path) -> None:
        """`steps` are the first and the last. The first of several processes traces its devices."""
        first, last = steps or (0, -1)
        self._steps = range(first, last + 1) if processes.index() == 0 else range(0)
        self._folder = folder
        self._traced, self._program = 0, lambda: ""

    def run(self, step: int, paused: Paused, function: CompiledOnce[..., Any], *args: Any) -> Any:
        """The result of a compiled step, traced if it is in the window; waits for the last and reads it in `paused`."""
        if step not in self._steps:
            return function(*args)
        if not self._traced:
            jax.block_until_ready(args)  # the step before is still running
            try:
                jax.profiler.start_trace(self._folder, profiler_options=OPTIONS)
            except Exception as error:  # such as another trace of this process
                _log.warning("the profile cannot be made: %s", error)
                self._steps = range(0)
                return function(*args)
        self._traced, self._program = self._traced + 1, function.text
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            result = function(*args)
        if step == self._steps[-1]:
            jax.block_until_ready(result)
            with paused():
                self.close()
        return result

    def close(self) -> None:
        """Ends a trace and shows it."""
        steps, self._traced = self._traced, 0
        if steps:
            try:
                jax.profiler.stop_trace()
                table = kernels(self._folder, steps, program=self._program()).table(12)
                _log.info("profile of %d steps on %s in %s: %s", steps, jax.default_backend(), self._folder, table)
            except Exception as error:  # such as a full disk; the run continues
                _log.warning("the profile cannot be shown: %s", error)
