"""Minutes of real training: the bytes of this interpreter's standard library, until a clock runs out.

`llama_*` and `t5_*` need numpy and jax only: a token is a byte. `script_*` runs scripts/pretrain.py itself, which
needs grain and TFDS; a machine without a network gets them from benchmarks/gpu/carry.sh.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.gpu.common import report
from benchmarks.gpu.train import Case, prepare, run_config, speed
from jaxllm.config import OptimizerConfig, RunConfig, T5Config
from jaxllm.data.objectives import Denoiser, denoise, solve_lengths
from jaxllm.data.packing import pack_pairs

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = {"script_llama": "llama_125m", "script_t5": "t5_tiny"}
RUNS = {
    "llama_bf16": Case("125m", 64, 1024, remat="elementwise"),
    "t5_bf16": Case("t5_small", 128, 512, 114),
    "llama_fp16": Case("125m", 64, 1024, compute="float16"),
    "t5_fp16": Case("t5_small", 128, 512, 114, compute="float16"),
}
CASES = (*RUNS, *SCRIPTS)
_EOS, _SENTINELS = 256, np.arange(383, 283, -1, dtype=np.int32)
_DENOISER = Denoiser(0.15, 3.0)


def main(name: str, *, toy: bool) -> None:
    """Trains for PRETRAIN_SECONDS (180) and reports whether and how fast the loss fell."""
    seconds = 0.5 if toy else float(os.environ.get("PRETRAIN_SECONDS", "180"))
    if name in SCRIPTS:
        run_script(name, seconds, toy=toy)
        return
    case = RUNS[name]
    config = run_config(case, toy=toy)
    t5 = isinstance(config.model, T5Config)
    rate = 1e-2 if t5 else 1e-3
    optimizer = OptimizerConfig(
        name="adamw_rms" if t5 else "adamw", learning_rate=rate, schedule="constant", warmup_steps=100
    )
    config = dataclasses.replace(config, optimizer=optimizer)
    batches = t5_batches(config) if t5 else llama_batches(config)
    batch = next(batches)
    step, state, compile_seconds = prepare(config, batch)
    losses: list[float] = []
    previous, start = None, time.perf_counter()
    while time.perf_counter() - start < seconds or len(losses) < 4:
        state, metrics = step(state, batch)
        batch = next(batches)  # while the device works
        if previous is not None:
            losses.append(float(previous.loss))
        previous = metrics
    elapsed = (time.perf_counter() - start) / (len(losses) + 1)
    tail = max(len(losses) // 20, 1)
    first, last = float(np.mean(losses[:tail])), float(np.mean(losses[-tail:]))
    if not (np.isfinite(losses[-1]) and (toy or last < 0.8 * first)):
        raise SystemExit(f"{name}: the loss went from {first} to {last} in {len(losses)} steps")
    report(
        "pretrain",
        name,
        steps=len(losses) + 1,
        seconds={"median": elapsed},
        compile_seconds=compile_seconds,
        first_loss=first,
        last_loss=last,
        skipped_steps=float(previous.skipped) if previous is not None else 0.0,
        loss_scale=float(previous.loss_scale) if previous is not None else 1.0,
        **speed(config, elapsed),
    )


def library_bytes() -> np.ndarray:
    """The sources of the standard library as one array of bytes, each file ended by an end token."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts = [np.append(np.frombuffer(path.read_bytes(), np.uint8).astype(np.int32), _EOS) for path in files]
    return np.concatenate([parts[i] for i in np.random.default_rng(0).permutation(len(parts))])


def llama_batches(config: RunConfig) -> Iterator[dict[str, np.ndarray]]:
    """Rows from random places of the text."""
    text, rng = library_bytes(), np.random.default_rng(1)
    rows, length = config.training.batch_size, config.data.sequence_length
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    weights = np.ones((rows, length), np.float32)
    while True:
        starts = rng.integers(0, len(text) - length - 1, (rows, 1))
        cut = text[starts + np.arange(length + 1)]
        yield {"tokens": cut[:, :-1], "targets": cut[:, 1:], "positions": positions, "weights": weights}


def t5_batches(config: RunConfig) -> Iterator[dict[str, np.ndarray]]:
    """Span corruption of stretches from random places of the text."""
    text, rng = library_bytes(), np.random.default_rng(1)
    rows, length = config.training.batch_size, config.data.sequence_length
    raw = solve_lengths(_DENOISER, inputs=length, targets=config.data.target_length).raw
    while True:
        start = rng.integers(0, len(text) - raw * rows)
        stretch = text[start : start + raw * rows]
        none = [np.zeros(0, np.int32)]
        pairs = denoise(rng, stretch, [_DENOISER], raw=[raw], modes=none, sentinels=_SENTINELS, eos_id=_EOS)
        width = config.data.target_length or length
        batch = pack_pairs(pairs, inputs_length=length, targets_length=width, start_id=0, alone=True)
        yield {name: value[:rows] for name, value in batch.items()}


def run_script(name: str, seconds: float, *, toy: bool) -> None:
    """scripts/pretrain.py until a signal, as a user would stop it."""
    needed = ("grain", "tensorflow_datasets", "array_record", "pydantic")
    missing = [module for module in needed if importlib.util.find_spec(module) is None]
    if missing:
        raise SystemExit(f"{name}: {', '.join(missing)} not installed; fill wheels/ by benchmarks/gpu/carry.sh")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "scripts" / "pretrain.py"), *script_arguments(name, folder, toy=toy)]
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, "PYTHONPATH": _paths()}, stdout=subprocess.PIPE, text=True
        )
        try:
            output, _ = process.communicate(timeout=120 if toy else seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=120)
        if process.returncode != 0:
            raise SystemExit(f"{output[-1000:]}\n{name}: scripts/pretrain.py ended with {process.returncode}")
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    first, last = rows[0]["loss"], rows[-1]["loss"]
    if not (np.isfinite(last) and (toy or last < 0.8 * first)):
        raise SystemExit(f"{name}: the loss went from {first} to {last} in {rows[-1]['step']} steps")
    keys = ("step", "bits_per_byte", "bits_per_target_byte", "tokens_per_second", "mfu", "data_wait")
    kept: dict[str, Any] = {key: rows[-1][key] for key in keys if key in rows[-1]}
    report("pretrain", name, first_loss=first, last_loss=last, **kept)


def script_arguments(name: str, folder: str, *, toy: bool) -> list[str]:
    """What stands behind scripts/pretrain.py: a shipped config in bfloat16, of a toy its smallest form."""
    arguments = [str(ROOT / "configs" / f"{SCRIPTS[name]}.yaml"), f"training.run_dir={folder}/run"]
    arguments += [f"training.compilation_cache={folder}/cache", "training.log_every=5", "training.sample_tokens=0"]
    arguments += ["precision.compute=bfloat16"]
    if not toy:
        endless = "1000000"  # the clock ends it
        arguments += [f"training.{name}={endless}" for name in ("steps", "save_every", "eval_every")]
        return [*arguments, "data.source=stdlib"]
    corpus = Path(folder) / "corpus"
    corpus.mkdir()
    for source in sorted(Path(sysconfig.get_path("stdlib")).glob("a*.py")):
        (corpus / f"{source.stem}.txt").write_text(source.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    arguments += ["data.source=files", f"data.path={corpus}", "data.validation_fraction=0.3", "data.workers=0"]
    arguments += ["training.steps=6", "optimizer.warmup_steps=1", "optimizer.decay_steps=1"]
    arguments += ["training.batch_size=8", "training.eval_batches=1"]
    arguments += ["data.sequence_length=32", "model.vocab_size=512", "model.num_layers=1", "model.d_model=32"]
    return [*arguments, "model.num_heads=2", *(["model.num_kv_heads=2"] if "llama" in name else ["model.head_dim=8"])]


def _paths() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


if __name__ == "__main__":
    main(sys.argv[1], toy=jax.default_backend() != "gpu")
