"""Does float16 or bfloat16 train as float32 does? Same seed, same batches, both families; curves, and what underflows.

    python benchmarks/precision.py [--families llama t5] [--steps 300] [--full]

Each run is a whole `pretrain` of configs/llama_tiny.yaml or configs/t5_tiny.yaml, with a narrower model unless
--full. Every run reads the same tokenizer. The gradients of the trained float32 model are then computed in float16 at
several loss scales: an element is lost when float16 makes it 0 and float32 does not. Results:
benchmarks/results/precision_*.json, docs/images/precision_*.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from train_step import environment

from jaxllm.config import RunConfig
from jaxllm.config_file import load_config
from jaxllm.data.pipeline import build_pipeline
from jaxllm.models import build, init_params
from jaxllm.training.checkpoint import Checkpoints
from jaxllm.training.loss import build_loss
from jaxllm.training.optimizer import build_optimizer
from jaxllm.training.precision import build_model, cast_floating
from jaxllm.training.train_step import accumulate_gradients, init_train_state
from jaxllm.training.trainer import pretrain

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parent.parent
RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
# Grows every 50 steps, so that 300 steps see the scale find its limit.
DYNAMIC = ("precision.compute=float16", "precision.loss_scale=dynamic", "precision.growth_interval=50")
RUNS = {
    "float32": ("precision.compute=float32",),
    "bfloat16": ("precision.compute=bfloat16",),
    "float16, dynamic scale": DYNAMIC,
    "float16, dynamic scale, retries": (*DYNAMIC, "precision.retries=4"),
    "float16, scale 1": ("precision.compute=float16", "precision.loss_scale=static", "precision.initial_scale=1"),
}
NARROW = {
    "llama": ("d_model=128", "d_ff=320", "num_layers=3", "num_heads=4", "num_kv_heads=2", "vocab_size=2048"),
    "t5": ("d_model=96", "d_ff=256", "num_layers=2", "num_heads=3"),
}
SCALES = (0, 8, 16)  # exponents of 2


def main() -> None:
    """Runs everything one after the other and writes one JSON and three pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(NARROW), default=list(NARROW))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--full", action="store_true", help="the models of the configs as they are")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    IMAGES.mkdir(parents=True, exist_ok=True)
    families = {}
    with tempfile.TemporaryDirectory() as work:
        for family in arguments.families:
            families[family] = measure_family(family, arguments.steps, arguments.full, Path(work))
    result = {"benchmark": "precision", "steps": arguments.steps, "full": arguments.full, **environment()}
    result["families"] = {name: summary(runs, lost) for name, (runs, lost) in families.items()}
    path = RESULTS / f"precision_{result['device'].replace(' ', '_')}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot_losses({name: runs for name, (runs, _) in families.items()})
    plot_lost({name: lost for name, (_, lost) in families.items()})
    plot_scales({name: runs for name, (runs, _) in families.items()})
    print(json.dumps(result["families"], indent=1))


def run_config(family: str, run: str, steps: int, full: bool, work: Path) -> RunConfig:
    """The config of one run; all runs of a family share tokenizer and data."""
    narrow = () if full else tuple(f"model.{setting}" for setting in NARROW[family])
    length = () if full else ("data.sequence_length=128",)
    shared = work / family / "float32" / "tokenizer.json"
    settings = (
        f"training.run_dir={work / family / run}",
        f"training.steps={steps}",
        f"optimizer.warmup_steps={steps // 6}",
        f"optimizer.decay_steps={steps // 5 if family == 'llama' else 0}",
        f"data.cache_dir={work / 'data'}",
        *("training.log_every=5", "training.sample_tokens=0", "training.save_every=100000"),
        *("training.eval_every=100000", "training.eval_batches=64", "training.compilation_cache=null"),
        *((f"data.tokenizer={shared}",) if shared.exists() else ()),
    )
    return load_config(ROOT / "configs" / f"{family}_tiny.yaml", (*settings, *narrow, *length, *RUNS[run]))


def measure_family(family: str, steps: int, full: bool, work: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rows of metrics and the last validation of every run, and the lost gradients of the float32 one."""
    runs = {}
    for run in RUNS:
        config, before = run_config(family, run, steps, full, work), time.perf_counter()
        done = pretrain(config)
        lines = (Path(config.training.run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if "loss" in row]
        runs[run] = {"validation": done.validation, "rows": rows, "seconds": time.perf_counter() - before}
        print(f"{family}, {run}: validation {done.validation['loss']:.4f}, {runs[run]['seconds']:.0f} s", flush=True)
    return runs, lost_gradients(run_config(family, "float32", steps, full, work))


def lost_gradients(config: RunConfig) -> dict[str, Any]:
    """Histogram of the exponents of all weight gradients of a trained run, and the part float16 loses by scale."""
    model = build_model(config)
    rule = build_optimizer(config.optimizer, config.precision, steps=config.training.steps)
    state = jax.eval_shape(lambda: init_train_state(init_params(model, jax.random.key(0)), rule, jax.random.key(0)))
    restored = Checkpoints(Path(config.training.run_dir) / "checkpoints", keep=1).restore(state)
    assert restored is not None
    pipeline = build_pipeline(
        config.data,
        vocab_size=config.model.vocab_size,
        batch_size=config.training.batch_size,
        seed=config.training.seed,
        run_dir=Path(config.training.run_dir),
    )
    batch = next(pipeline)
    pipeline.close()
    exact = _gradients(config, jnp.float32, restored.state.params, batch, 0)
    exact = exact[exact != 0]  # rows of tokens that are not in the batch have none
    exponents, counts = np.unique(np.floor(np.log2(np.abs(exact))).astype(int), return_counts=True)
    whole = _gradients(config, jnp.float32, restored.state.params, batch, 0) != 0
    lost = {}
    for scale in SCALES:
        half = _gradients(config, jnp.float16, restored.state.params, batch, scale)
        lost[scale] = float(np.mean(half[whole] == 0))
    return {"exponents": exponents.tolist(), "counts": counts.tolist(), "lost": lost}


def _gradients(config: RunConfig, dtype: Any, params: Any, batch: Any, scale: int) -> np.ndarray:
    """All elements of the gradient of the mean loss, carried times 2^scale."""
    loss = build_loss(build(dataclasses.replace(config.model, layers="scan"), dtype=dtype), config.training)
    factor = jnp.float32(2.0**scale / max(float(np.sum(batch["weights"])), 1.0))

    def gradients(params: Any, batch: Any) -> Any:
        compute = cast_floating(params, dtype)
        return accumulate_gradients(loss, compute, batch, jax.random.key(0), factor=factor, accumulation=1)[1]

    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.jit(gradients)(params, batch))])


def summary(runs: dict[str, Any], lost: dict[str, Any]) -> dict[str, Any]:
    """What the JSON keeps of a family."""
    base = runs["float32"]["validation"]["loss"]
    table = {
        name: {
            "validation_loss": run["validation"]["loss"],
            "ratio_to_float32": run["validation"]["loss"] / base,
            "loss_scale": run["rows"][-1].get("loss_scale"),
            "skipped": run["rows"][-1].get("skipped"),
            "retried": run["rows"][-1].get("retried"),
            "tokens_per_second": float(np.median([row["tokens_per_second"] for row in run["rows"][2:]])),
            "seconds": run["seconds"],
        }
        for name, run in runs.items()
    }
    return {"runs": table, "gradients": lost}


def plot_losses(families: dict[str, Any]) -> None:
    """Training loss of every run, one panel per family."""
    figure, axes = plt.subplots(1, len(families), figsize=(9, 3.4), squeeze=False)
    for axis, (family, runs) in zip(axes[0], families.items(), strict=True):
        for name, run in runs.items():
            style = {"float32": {"color": "black", "linewidth": 2.5}, "float16, scale 1": {"linestyle": "--"}}
            points = [(row["step"], row["loss"]) for row in run["rows"]]
            label = f"{name}: {run['validation']['loss']:.4f}"
            axis.plot(*zip(*points, strict=True), label=label, **style.get(name, {"linewidth": 1}))
        axis.set(title=f"{family}: training loss (legend: last validation)", xlabel="step", yscale="log")
        axis.legend(fontsize=6)
    _save(figure, "precision_losses")


def plot_lost(families: dict[str, Any]) -> None:
    """Exponents of gradients beside the range of float16 at each scale."""
    figure, axes = plt.subplots(1, len(families), figsize=(9, 3.4), squeeze=False)
    for axis, (family, result) in zip(axes[0], families.items(), strict=True):
        counts = np.array(result["counts"])
        axis.bar(result["exponents"], counts / counts.sum(), width=1, color="0.6")
        for scale, color in zip(SCALES, ("tab:red", "tab:orange", "tab:green"), strict=True):
            text = f"scale 2^{scale}: {result['lost'][scale]:.1%} lost"
            axis.axvline(-24 - scale, color=color, label=text)
        axis.set(title=f"{family}: weight gradients", xlabel="exponent of 2; left of a line float16 has only 0")
        axis.legend(fontsize=7)
    _save(figure, "precision_gradients")


def plot_scales(families: dict[str, Any]) -> None:
    """Loss scale over time, and the least headroom of any block's activations."""
    figure, axes = plt.subplots(1, len(families), figsize=(9, 3.0), squeeze=False)
    for axis, (family, runs) in zip(axes[0], families.items(), strict=True):
        rows = runs["float16, dynamic scale"]["rows"]
        steps = [row["step"] for row in rows]
        axis.plot(steps, [np.log2(row["loss_scale"]) for row in rows], label="log2 of the loss scale")
        room = [min(value for key, value in row.items() if key.startswith("headroom/")) for row in rows]
        axis.plot(steps, room, label="least headroom of activations (bits)")
        axis.set(title=f"{family}, float16", xlabel="step", ylim=(0, None))
        axis.legend(fontsize=7)
    _save(figure, "precision_scale")


def _save(figure: Any, name: str) -> None:
    figure.tight_layout()
    figure.savefig(IMAGES / f"{name}.png", dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    main()
