"""What the parts share: the shapes, the form of a result, and how time is taken.

A part prints one line per result, so that what it has measured survives whatever happens to it next.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from jaxllm.config import LlamaConfig, RopeConfig, T5Config

RESULT = "RESULT "

_LLAMA = {"rope": RopeConfig(theta=500_000.0), "max_length": 8192, "layers": "unroll", "vocab_size": 128_256}
_T5 = {"vocab_size": 32_128, "layers": "unroll"}
SHAPES: dict[str, LlamaConfig | T5Config] = {
    "1b": LlamaConfig(
        d_model=2048, d_ff=8192, num_layers=16, num_heads=32, num_kv_heads=8, tie_embeddings=True, **_LLAMA
    ),
    "8b": LlamaConfig(d_model=4096, d_ff=14_336, num_layers=32, num_heads=32, num_kv_heads=8, **_LLAMA),
    "8b_8layers": LlamaConfig(d_model=4096, d_ff=14_336, num_layers=8, num_heads=32, num_kv_heads=8, **_LLAMA),
    "t5_base": T5Config(d_model=768, d_ff=2048, num_layers=12, num_heads=12, **_T5),
    "t5_large": T5Config(d_model=1024, d_ff=2816, num_layers=24, num_heads=16, **_T5),
}


def shape(name: str, *, toy: bool, **changes: Any) -> LlamaConfig | T5Config:
    """A shape by name; a toy keeps the family and what is special about it."""
    config = dataclasses.replace(SHAPES[name], **changes)
    if not toy:
        return config
    small = {"vocab_size": 384, "d_model": 32, "d_ff": 48, "num_layers": 1, "num_heads": 4, "head_dim": 8}
    if isinstance(config, LlamaConfig):
        return dataclasses.replace(config, num_kv_heads=2, **small)
    return dataclasses.replace(config, num_decoder_layers=1, **small)


def report(part: str, case: str, **values: Any) -> None:
    """Prints one result."""
    # One write for the whole line: other threads of the process write to the same file.
    print(RESULT + json.dumps({"part": part, "case": case, **values}) + "\n", end="", flush=True)


def results_in(text: str) -> list[dict[str, Any]]:
    """All results in the output of a process; one that was cut off is left out, and what follows it on its line."""
    found = []
    for rest in text.split(RESULT)[1:]:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.JSONDecoder().raw_decode(rest)[0])
    return [each for each in found if isinstance(each, dict) and {"part", "case"} <= each.keys()]


def spread(times: list[float]) -> dict[str, float]:
    """Median and the tenth and ninetieth percentile."""
    ordered = sorted(times)
    last = len(ordered) - 1
    return {"median": statistics.median(ordered), "p10": ordered[last // 10], "p90": ordered[last - last // 10]}


def time_groups(run: Callable[[int], Any], *, groups: int, size: int) -> list[float]:
    """Seconds per step, once per group: `run(size)` takes `size` steps and returns when the device has done them."""
    times = []
    for _ in range(groups):
        before = time.perf_counter()
        run(size)
        times.append((time.perf_counter() - before) / size)
    return times


def achievable(kind: str) -> tuple[float, float] | None:
    """Measured bfloat16 FLOP/s and copied bytes/s of a device, as benchmarks.gpu.probe finds them; None elsewhere."""
    table = {"H200": (790e12, 4.3e12), "H100": (790e12, 3.0e12)}
    return next((peaks for name, peaks in table.items() if name in kind), None)
