"""Facts of a GPU in about a minute, one line each: cuDNN's attention, matmuls, copies and sustained clocks.

    python -m benchmarks.gpu.probe [--toy]

Each attention call that jaxllm makes is compared with float32 on the CPU, values and gradients, and timed at its real
size (`benchmarks.gpu.attention_calls`); `change` names what a bad verdict changes in the code, or which choice a speed
supports. A fact that fails does not stop the next. Lines also go to $OUT/probe.jsonl.
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from benchmarks.gpu.attention_calls import ATTENTION, attend, failed, prepare, row_of, small, timed
from benchmarks.gpu.card import CLOCKS, smi
from benchmarks.report import report

# Seconds after which no further fact is begun.
SECONDS = 80.0


class Product(NamedTuple):
    """A matmul [m, k] x [k, n]; `decides` names the choice that its speed supports."""

    m: int
    k: int
    n: int
    out: str
    decides: str


PRODUCTS = (
    Product(8192, 8192, 8192, "bfloat16", "the roof of all others"),
    Product(32768, 2048, 8192, "bfloat16", "the MLP of 1b: @cublas if far below the roof"),
    Product(2048, 32768, 8192, "bfloat16", "its weight gradient in 16 bits"),
    Product(2048, 32768, 8192, "float32", "its weight gradient in float32: sum_of_outer's dtype if slower"),
    Product(4096, 2048, 128256, "float32", "a chunk of logits"),
    Product(4096, 2048, 128256, "bfloat16", "islands.logits=bfloat16 if faster"),
    Product(32768, 1024, 2816, "bfloat16", "the MLP of t5_large: more rows if far below the roof"),
    Product(32768, 1024, 1024, "bfloat16", "a projection of t5_large: @merger0 if far below"),
    Product(1024, 32768, 1024, "float32", "its weight gradient: @cublas if far below"),
)


def main(name: str = "all", *, toy: bool = False) -> None:
    """Prints all facts (the one case is `all`); at toy sizes jax's own attention stands for cuDNN's."""
    del name
    start = time.monotonic()
    sys.setswitchinterval(1e-4)  # a thread that compiles holds the interpreter for less time between two kernels
    # Programs are compiled ahead, in order. None has a matmul, since XLA would time its kernels meanwhile.
    pool = ThreadPoolExecutor(max_workers=1 if toy else 4)
    # The peak rates come first, because the card would be idle until the first attention is compiled.
    peaks = [("sustained", functools.partial(sustained, toy=toy)), ("copy", functools.partial(copy, toy=toy))]
    facts = [("machine", machine), *peaks, *_attention_facts(pool, toy=toy)]
    for product in PRODUCTS:
        shape = f"{product.m}x{product.k}x{product.n}_{product.out}"
        facts.append((f"product_{shape}", functools.partial(multiply, product, toy=toy)))
    try:
        _run(facts, until=start + SECONDS)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


Fact = Callable[[], dict[str, Any]]


def _run(facts: list[tuple[str, Fact]], *, until: float) -> None:
    for name, fact in facts:
        if time.monotonic() > until:
            say(name, {"verdict": "left out", "error": f"{SECONDS:.0f} s were over"})
            continue
        begun = time.monotonic()
        try:
            values = fact()
        except Exception as error:
            values = failed(error)
        say(name, {**values, "wall_seconds": round(time.monotonic() - begun, 2)})


def say(name: str, values: dict[str, Any]) -> None:
    """Prints one fact and appends it to $OUT/probe.jsonl."""
    report("probe", name, **values)
    if folder := os.environ.get("OUT"):
        with (Path(folder) / "probe.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"case": name, **values}) + "\n")


def _attention_facts(pool: ThreadPoolExecutor, *, toy: bool) -> Iterator[tuple[str, Fact]]:
    for name, case in ATTENTION.items():
        run = small(case) if toy else case
        ready = pool.submit(prepare, run, "xla" if toy else "cudnn")
        yield name, functools.partial(attend, run, ready, row_of(case))


def multiply(product: Product, *, toy: bool) -> dict[str, Any]:
    """Times one matmul; its compilation includes XLA's own trials of kernels."""
    m, k, n = (64, 64, 64) if toy else product[:3]
    left, right = _random(m, k), _random(k, n)
    step = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.dtype(product.out)))
    start = time.monotonic()
    step = step.lower(left, right).compile()
    seconds = time.monotonic() - start
    each = timed(step, left, right)
    facts = {"tflops": 2 * m * k * n / each / 1e12, "ms": 1e3 * each, "compile_seconds": round(seconds, 2)}
    return {**facts, "change": product.decides}


def _random(*shape: int) -> jax.Array:
    block = np.random.default_rng(0).standard_normal(1_000_003, np.float32)
    return jnp.asarray(np.resize(block.astype(ml_dtypes.bfloat16), shape))


def sustained(*, toy: bool) -> dict[str, Any]:
    """Matmuls without a pause: the rate at the beginning and after seconds, and the clocks then."""
    side, seconds = (64, 0.05) if toy else (8192, 3.0)
    a = _random(side, side)
    step = jax.jit(lambda x: jnp.matmul(x, x))
    step(a).block_until_ready()
    reader = ThreadPoolExecutor(max_workers=1)  # nvidia-smi takes as long as some matmuls
    rates, watch, start = [], None, time.perf_counter()
    while (now := time.perf_counter()) - start < seconds:
        for _ in range(50):
            out = step(a)
        if watch is None and now - start > seconds / 2:
            watch = reader.submit(smi, *CLOCKS)
        out.block_until_ready()
        rates.append(50 * 2 * side**3 / (time.perf_counter() - now) / 1e12)
    clocks = watch.result() if watch is not None else {}
    return {"tflops_first": rates[0], "tflops": float(np.median(rates[len(rates) // 2 :])), **clocks}


def copy(*, toy: bool) -> dict[str, Any]:
    """Bytes read and written per second by a large copy."""
    a = jnp.zeros((2**10 if toy else 2**31,), jnp.bfloat16)
    seconds = timed(jax.jit(lambda x: x + jnp.bfloat16(1)), a)
    return {"terabytes_per_second": 2 * a.nbytes / seconds / 1e12}


def machine() -> dict[str, Any]:
    """Versions and the device, as far as they can be found out."""
    from jax._src.cudnn.fused_attention_stablehlo import check_cudnn_version

    facts = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "cores": os.cpu_count()}
    try:
        facts["cudnn"] = check_cudnn_version()
    except RuntimeError as error:
        facts["cudnn"] = str(error)
    return facts | smi("name", "driver_version", "memory.total", *CLOCKS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy sizes, on any machine")
    main(toy=parser.parse_args().toy)
