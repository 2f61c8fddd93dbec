"""Where the time of a step goes: the kernels of a jax.profiler trace, without TensorFlow.

A trace holds every kernel with its duration. Kernels that differ only in their number or layer are added up. Each
line names their operation in jax, from the trace or from the text of the compiled program. The fraction of time in
which no kernel runs is the gap that a CUDA graph or larger kernels would close.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData

# Kernels that are printed; profiles.jsonl has all.
SHOWN = 40
_KEPT = 20  # the largest, which the results hold too


class Kernel(NamedTuple):
    """Kernels of one kind."""

    name: str  # XLA's or the library's, without its number
    where: str  # the operation of jax, without the number of its layer; empty where nothing names it
    milliseconds: float  # of one step
    calls: float  # in one step
    fraction: float  # of the time of all kernels


class Profile(NamedTuple):
    """What the device did."""

    step_milliseconds: float  # from the first kernel of the trace to the end of its last, for one step
    busy: float  # fraction of that in which a kernel ran
    kernels: list[Kernel]  # largest first


class _Event(NamedTuple):
    name: str
    where: str
    start: float
    end: float


def record(run: Callable[[int], Any], *, steps: int, program: str = "") -> Profile:
    """Traces `run(steps)`, which returns when the device has done them; `program` is the compiled text."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run(steps)
        return kernels(folder, steps, program=program)


def kernels(folder: str | Path, steps: int, *, program: str = "") -> Profile:
    """The profile of the newest trace in a folder.

    Raises:
        ValueError: without a trace, or without one of a device.
    """
    files = sorted(Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise ValueError(f"no trace (*.xplane.pb) in {folder}")
    events = list(_events(ProfileData.from_file(str(files[-1])), sources(program)))
    if not events:
        raise ValueError(f"{files[-1]} holds no kernel")
    kinds: dict[tuple[str, str], list[float]] = {}
    for event in events:
        kinds.setdefault((kind(event.name), re.sub(r"\d+", "*", event.where)), []).append(event.end - event.start)
    total = sum(event.end - event.start for event in events)
    found = [
        Kernel(*names, sum(times) / 1e6 / steps, len(times) / steps, sum(times) / total)
        for names, times in kinds.items()
    ]
    whole = max(event.end for event in events) - min(event.start for event in events)
    return Profile(whole / 1e6 / steps, _covered(events) / whole, sorted(found, key=lambda each: -each.milliseconds))


def kind(name: str) -> str:
    """A kernel's name without the numbers at its end."""
    return re.sub(r"([._]\d+)+$", "", name)


def sources(program: str) -> dict[str, str]:
    """Operation of jax by the name that XLA gave to its kernel, from the text of a compiled program."""
    found = re.findall(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name=\"([^\"]*)\"", program, re.MULTILINE)
    # In a CUDA graph a kernel may be known by its function alone, which has no dots.
    return {name.replace(".", "_"): where for name, where in found} | dict(found)


def _events(data: Any, known: dict[str, str]) -> Iterator[_Event]:
    """What the first GPU's streams ran; without a GPU, what XLA:CPU's threads ran."""
    planes = list(data.planes)
    gpus = sorted((plane for plane in planes if plane.name.startswith("/device:GPU")), key=lambda plane: plane.name)
    for plane in gpus[:1] or planes:
        for line in plane.lines:
            if gpus and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                stats = {str(key): value for key, value in event.stats}
                operation = str(stats.get("hlo_op", ""))
                if gpus or operation:
                    name = operation or event.name
                    where = known.get(name) or str(stats.get("name") or stats.get("tf_op") or "")
                    yield _Event(name, where, event.start_ns, event.start_ns + event.duration_ns)


def _covered(events: Sequence[_Event]) -> float:
    """Nanoseconds in which at least one event runs."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda each: each.start):
        total += max(0.0, event.end - max(event.start, until))
        until = max(until, event.end)
    return total


def table(profile: Profile, *, most: int = SHOWN) -> str:
    """The largest kernels as text."""
    head = (
        f"{profile.step_milliseconds:.3f} ms a step, {profile.busy:.1%} of it in kernels; {len(profile.kernels)} kinds"
    )
    rows = [
        f"{each.milliseconds:9.3f} ms {each.calls:7.1f}x {each.fraction:6.1%}  {each.name[:60]:60} {each.where[-90:]}"
        for each in profile.kernels[:most]
    ]
    return "\n".join([head, *rows])


def traced(
    part: str, case: str, run: Callable[[int], Any], *, steps: int, program: Callable[[], str] = str
) -> dict[str, Any]:
    """Profiles a case and shows it; returns the main figures, or why there are none: a case is worth more."""
    try:
        found = record(run, steps=steps, program=program())
    except Exception as error:
        return {"profile_error": f"{type(error).__name__}: {error}"[:300]}
    show(part, case, found)
    largest = [kernel._asdict() for kernel in found.kernels[:_KEPT]]
    return {"traced_step_ms": found.step_milliseconds, "device_busy": found.busy, "kernels": largest}


def show(part: str, case: str, profile: Profile) -> None:
    """Prints the table and adds it to $OUT/profiles.txt, and all kernels to $OUT/profiles.jsonl."""
    text = f"profile of {part}/{case}: {table(profile)}\n"
    print(text, flush=True)
    if folder := os.environ.get("OUT"):
        line = json.dumps({"part": part, "case": case, **profile._asdict()}) + "\n"
        for name, added in (("profiles.txt", text + "\n"), ("profiles.jsonl", line)):
            with (Path(folder) / name).open("a", encoding="utf-8") as file:
                file.write(added)
