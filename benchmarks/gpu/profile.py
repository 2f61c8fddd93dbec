"""Profiles of the cases: the largest kernels of a jax.profiler trace, printed and written to $OUT."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxllm.run.profile import OPTIONS, Profile, kernels

# Kernels that are printed; profiles.jsonl has all.
SHOWN = 40
_KEPT = 20  # the largest, which the results hold too


def record(run: Callable[[int], Any], *, steps: int, program: str = "") -> Profile:
    """Traces `run(steps)`, which returns when the device has done them; `program` is the compiled text."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=OPTIONS):
            run(steps)
        return kernels(folder, steps, program=program)


def traced(
    part: str, case: str, run: Callable[[int], Any], *, steps: int, seconds: float, program: Callable[[], str] = str
) -> dict[str, Any]:
    """Profiles a case and shows it; returns the main figures, or the error: a failed profile does not fail the case.

    `seconds` is the duration of a timed step. XLA runs no CUDA graphs under a trace, so a traced step has the kernels
    of a timed one and larger gaps: `device_busy` is the time in kernels over that of the timed step.
    """
    try:
        found = record(run, steps=steps, program=program())
    except Exception as error:
        return {"profile_error": f"{type(error).__name__}: {error}"[:300]}
    show(part, case, found)
    largest = [kernel._asdict() for kernel in found.kernels[:_KEPT]]
    kernel_ms = found.step_milliseconds * found.busy
    figures = {"traced_step_ms": found.step_milliseconds, "kernel_ms": kernel_ms}
    return {**figures, "device_busy": kernel_ms / 1e3 / seconds, "kernels": largest}


def show(part: str, case: str, profile: Profile) -> None:
    """Prints the table and adds it to $OUT/profiles.txt, and all kernels to $OUT/profiles.jsonl."""
    text = f"profile of {part}/{case}, traced without CUDA graphs: {profile.table(SHOWN)}\n"
    print(text, flush=True)
    if folder := os.environ.get("OUT"):
        line = json.dumps({"part": part, "case": case, **profile._asdict()}) + "\n"
        for name, added in (("profiles.txt", text + "\n"), ("profiles.jsonl", line)):
            with (Path(folder) / name).open("a", encoding="utf-8") as file:
                file.write(added)
