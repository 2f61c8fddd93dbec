"""The cost of a checkpoint's fingerprint: seconds on this CPU, or bytes as XLA's GPU compiler plans them for an H200.

    python -m benchmarks.fingerprint [CONFIG ...] [--turns 9]
    python -m benchmarks.fingerprint [CONFIG ...] --gpu    # after `bash benchmarks/gpu/compiler.sh`

A fingerprint is computed at each save. Its cost is compared with that of the steps between two saves, 100 by default.
A step's bytes for an H200 are those in benchmarks/results/compiled_H200.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import cards, compiled
from benchmarks.gpu.program import kernels
from benchmarks.sides import processor
from jaxllm.config.file import load_config
from jaxllm.storage.checkpoint import Checkpoints
from jaxllm.training.fingerprint import fingerprints
from jaxllm.training.fit import tree_bytes
from jaxllm.training.program import program_of


def seconds(run: Callable[[], Any]) -> float:
    """Of one run, until its result is there."""
    before = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - before


def on_cpu(name: str, *, turns: int, save_every: int) -> str:
    """A row of the table: step and fingerprint are timed in turns."""
    program = program_of(load_config(name))
    state = jax.jit(program.fresh_state)()
    rng = np.random.default_rng(0)
    top = program.config.model.vocab_size
    batch = {
        key: jnp.asarray(rng.integers(1, top, x.shape) if x.dtype == jnp.int32 else np.ones(x.shape), x.dtype)
        for key, x in program.abstract_batch().items()
    }
    batch = {key: jnp.ones_like(x) if "segment" in key else x for key, x in batch.items()}
    step = jax.jit(program.train_step, donate_argnums=0)
    steps, sums = [], []
    for _ in range(turns + 1):
        before = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        steps.append(time.perf_counter() - before)
        sums.append(seconds(lambda state=state: fingerprints(state)))
    one, all_sums = statistics.median(steps[1:]), statistics.median(sums[1:])
    fraction = all_sums / (save_every * one)
    size = tree_bytes(program.abstract_state()) / 1e6
    saved = statistics.median(save_seconds(state, turns))
    figures = f"{size:.0f} MB | {1e3 * one:.0f} ms | {1e3 * saved:.0f} ms | {1e3 * all_sums:.1f} ms"
    return f"| {name} | {figures} | {100 * fraction:.3f}% |"


def save_seconds(state: Any, turns: int) -> list[float]:
    """Of saves until they are on disk, fingerprint included."""
    found = []
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(Checkpoints(Path(folder), keep=1)) as checkpoints:
        for turn in range(turns):
            before = time.perf_counter()
            checkpoints.save(turn, state, {})
            checkpoints.wait()
            found.append(time.perf_counter() - before)
    return found


def on_gpu(name: str, *, save_every: int) -> str:
    """A row of the table for an H200 that is not here."""
    card = cards.devices_of("H200", 1)[0]
    with cards.pretend_gpu():
        state = program_of(load_config(name)).abstract_state()
        program = fingerprints.trace(compiled.place(state, card)).lower().compile()
    every = kernels(program.as_text() or "")
    moved = sum(kernel.times * kernel.bytes for kernel in every) / 1e9
    memory, of_state = program.memory_analysis(), tree_bytes(state) / 1e9
    temporary = 0 if memory is None else memory.temp_size_in_bytes / 1e6
    known = {each["case"]: each["moved_gb"] for each in json.loads(compiled.RESULTS.read_text())["results"]}
    fraction = f"{100 * moved / (save_every * known[name]):.3f}%" if name in known else "step not compiled"
    figures = f"{of_state:.2f} GB | {moved:.2f} GB | {moved / of_state:.2f}x | {temporary:.2f} MB | {len(every)}"
    return f"| {name} | {figures} | {fraction} |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", default=[])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--gpu", action="store_true", help="compile for an H200; nothing is run")
    arguments = parser.parse_args()
    if arguments.gpu:
        print("| run | state | moved | of the state | temporary | kernels | of the steps between two saves |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for name in arguments.configs or ["configs/llama_125m.yaml", "configs/llama3_1b.yaml", "configs/t5_large.yaml"]:
            print(on_gpu(name, save_every=arguments.save_every), flush=True)
        return
    print(f"jaxlib {version('jaxlib')} on {processor()}\n")
    print(
        "| run | state | step | save | fingerprint in it | of the steps between two saves |\n"
        "| --- | --- | --- | --- | --- | --- |"
    )
    for name in arguments.configs or ["configs/llama_tiny.yaml", "configs/t5_tiny.yaml"]:
        print(on_cpu(name, turns=arguments.turns, save_every=arguments.save_every), flush=True)


if __name__ == "__main__":
    sys.path.append(str(compiled.COMPILER))  # before jax looks for its plugins
    jax.config.update("jax_platforms", "cpu")
    main()
