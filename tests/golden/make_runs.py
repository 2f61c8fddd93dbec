"""Writes tests/golden/run_folders, run folders of an earlier commit with what that commit computes from them.

Later commits must resume, generate from, convert and start from these folders (tests/golden/test_runs.py). The script
uses the package of that commit, so it runs there and not against today's code:

    git worktree add ../at-2225bdf 2225bdf
    PYTHONPATH=../at-2225bdf JAX_PLATFORMS=cpu python tests/golden/make_runs.py

Each run trains to step 8 of 12 and is packed as NAME.zip. The rest of its 12 steps, greedy tokens, the converted
tensors and the first loss of a run that starts from it are in results.json. Paths in the configs are relative, so a
reader unpacks into an empty folder, puts the text there with the time MODIFIED, and works in that folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from jaxllm.config_file import load_config, parse_config
from jaxllm.generation import generate
from jaxllm.models import decoder_of
from jaxllm.training.export import export_run
from jaxllm.training.initial_params import load_run
from jaxllm.training.speaker import load_speaker
from jaxllm.training.trainer import pretrain

HERE = Path(__file__).parent / "run_folders"
TEXT = HERE / "text.jsonl"
MODIFIED = 1_700_000_000 * 10**9  # a corpus of files is known by their names, sizes and times
STOP, STEPS, NEW = 8, 12, 12

MODEL = {"vocab_size": 368, "d_model": 8, "d_ff": 12, "num_layers": 2, "num_heads": 2, "head_dim": 4}
T5 = {"family": "t5", **MODEL, "num_layers": 1, "num_decoder_layers": 2, "relative_buckets": 8}
SCALED = {"compute": "float16", "loss_scale": "dynamic"}
# Name -> model, precision and optimizer; together they hold every kind of optimizer state and schedule.
RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "llama_float32": {
        "model": {"family": "llama", **MODEL, "num_kv_heads": 1, "qk_norm": True},
        "optimizer": {"learning_rate": 0.02, "schedule": "wsd", "warmup_steps": 2, "decay_steps": 3},
    },
    "llama_float16": {
        "model": {"family": "llama", **MODEL, "tie_embeddings": True, "qkv_bias": True},
        "precision": {**SCALED, "initial_scale": 256.0, "growth_interval": 3},  # doubles after steps 3, 6 and 9
        "optimizer": {"learning_rate": 0.02, "schedule": "cosine", "moment_dtype": "bfloat16"},
    },
    "t5_float32": {
        "model": {**T5, "dropout_rate": 0.1},
        "optimizer": {"name": "adamw_rms", "learning_rate": 0.05, "schedule": "inverse_sqrt", "warmup_steps": 2},
    },
    "t5_float16": {
        "model": {**T5, "gated": False, "activation": "relu", "tie_embeddings": True, "scale_logits": True},
        "precision": {**SCALED, "initial_scale": 2.0**20},  # overflows in the first steps
        "optimizer": {"name": "adafactor", "learning_rate": 0.05, "schedule": "constant"},
    },
}
INIT_FROM = (
    "training.run_dir=second",
    "training.init_from=run",
    "data.tokenizer=run/tokenizer.json",
    "precision.initial_scale=256",
)
PROMPTS = {
    "llama": ["the cat", "line 3: the dog sat on"],
    "t5": ["line 2: the<extra_id_0> sat on", "line 5:<extra_id_0> the moon<extra_id_1>."],
}


def corpus() -> str:
    """24 documents of a few repeated sentences."""
    animals, places = ("cat", "dog", "owl"), ("mat", "hill", "moon", "wall", "road")
    rows = []
    for i in range(24):
        lines = (f"line {j}: the {animals[(i + j) % 3]} sat on the {places[i * j % 5]}.\n" for j in range(8))
        rows.append(json.dumps({"text": "".join(lines)}) + "\n")
    return "".join(rows)


def config(name: str) -> dict[str, Any]:
    """Sections of a run in the current folder."""
    llama = name.startswith("llama")
    cadence = {"save_every": 4, "eval_every": 4, "log_every": 1, "eval_batches": 2, "keep": 1}
    return {
        **RUNS[name],
        "data": {
            "source": "files",
            "path": "text.jsonl",
            "validation_fraction": 0.2,
            "sequence_length": 32,
            "objective": "causal" if llama else "span_corruption",
        },
        "training": {
            "run_dir": "run",
            "steps": STEPS,
            "batch_size": 4,
            "accumulation": 2 if llama else 1,
            "sample_tokens": 0,
            **cadence,
        },
    }


def rows(folder: str) -> list[dict[str, Any]]:
    """Numbers of the steps of a run, without times."""
    kept = ("step", "loss", "grad_norm", "learning_rate", "loss_scale", "skipped", "validation/loss")
    lines = (json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines())
    return [{key: line[key] for key in kept if key in line} for line in lines]


def continuations(family: str) -> list[dict[str, Any]]:
    """Greedy tokens of the newest checkpoint, and by how much each logit exceeds the next, relative to the largest."""
    speaker, (_, params) = load_speaker("run"), load_run("run")
    found = []
    for prompt in PROMPTS[family]:
        ids = speaker.encode(prompt)
        new = generate(speaker.model, speaker.params, [ids], max_new_tokens=NEW, eos_ids=(), pad_id=speaker.pad_id)[0]
        tokens, lengths, after = jnp.asarray([ids]), jnp.asarray([len(ids)]), jnp.asarray([new])
        logits = np.sort(decoder_of(speaker.model).full_logits(params, tokens, lengths, after)[0], axis=-1)
        margins = (logits[:, -1] - logits[:, -2]) / np.abs(logits).max()
        found.append({"prompt": prompt, "ids": ids, "new": new, "margins": [round(float(m), 5) for m in margins]})
    return found


def converted() -> dict[str, Any]:
    """config.json and a hash of each tensor of the directory that the run converts to."""
    export_run("run", "hf")
    tensors = load_file("hf/model.safetensors")
    hashes = {name: [*map(str, x.shape), str(x.dtype), digest(x)] for name, x in sorted(tensors.items())}
    return {"config": json.loads(Path("hf/config.json").read_text()), "tensors": hashes}


def digest(x: np.ndarray) -> str:
    """A hash of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()[:16]


def pack(name: str) -> None:
    """The run folder without prepared data, events and lock."""
    with zipfile.ZipFile(HERE / f"{name}.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path in sorted(Path("run").rglob("*")):
            if path.is_file() and path.parts[1] not in ("data", ".lock") and "tfevents" not in path.name:
                archive.writestr(zipfile.ZipInfo(str(path)), path.read_bytes(), zipfile.ZIP_DEFLATED)


def make(name: str) -> dict[str, Any]:
    """Trains one run in the current folder, packs it at step 8, and computes its results."""
    Path("text.jsonl").write_text(TEXT.read_text(encoding="utf-8"), encoding="utf-8")
    os.utime("text.jsonl", ns=(MODIFIED, MODIFIED))
    run = parse_config(config(name))
    assert pretrain(run, stop_at=STOP).step == STOP
    pack(name)
    before = rows("run")
    results = {"generated": continuations(run.model.family), "converted": converted()}
    pretrain(load_config("run/config.yaml", INIT_FROM), stop_at=1)
    assert pretrain(load_config("run/config.yaml")).resumed_from == STOP
    return {"before": before, "resumed": rows("run")[len(before) :], "init_from": rows("second")[0], **results}


def main() -> None:
    """Writes all runs and results.json."""
    HERE.mkdir(exist_ok=True)
    TEXT.write_text(corpus(), encoding="utf-8")
    made = {"jax": jax.__version__, "python": platform.python_version(), "machine": platform.machine()}
    results: dict[str, Any] = {"made": made, "modified": MODIFIED, "stop": STOP, "steps": STEPS, "init_from": INIT_FROM}
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            results[name] = make(name)
        print(name, (HERE / f"{name}.zip").stat().st_size, "bytes")
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
