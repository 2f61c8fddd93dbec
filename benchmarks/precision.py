"""Does float16 or bfloat16 train as float32 does? Same seed, same batches, both families; curves, and what underflows.

    python -m benchmarks.precision [--families llama t5] [--steps 300] [--full]

The models and rules are those of configs/llama_tiny.yaml and configs/t5_tiny.yaml, T5 as v1.0 (`ORIGINAL`), narrower
and on shorter rows unless --full. All runs of a family take the very same arrays. Training amplifies any difference, so
float32 runs whose initial parameters are moved by a thousandth (`MOVED`) show how far apart equal runs end. The
gradients of the trained float32 model are then computed in float16 at several loss scales: an element is lost when
float16 makes it 0 and float32 does not. Results: benchmarks/results/precision_*.json, docs/images/precision_*.png.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from benchmarks.sides import environment, save
from jaxllm.config import RunConfig
from jaxllm.config.file import load_config
from jaxllm.models import build, init_params
from jaxllm.run.feed import open_run_pipeline
from jaxllm.run.overflow import OverflowWatch
from jaxllm.training.loss import build_loss
from jaxllm.training.optimizer import build_optimizer
from jaxllm.training.precision import build_model, cast_floating
from jaxllm.training.program import program_of
from jaxllm.training.train_step import accumulate_gradients, init_train_state, make_eval_step, make_train_step

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
# Grows every 50 steps, so that 300 steps see the scale find its limit.
DYNAMIC = ("precision.compute=float16", "precision.loss_scale=dynamic", "precision.growth_interval=50")
RUNS = {
    "float32": ("precision.compute=float32",),
    "bfloat16": ("precision.compute=bfloat16",),
    "float16, dynamic scale": DYNAMIC,
    "float16, scale 1": ("precision.compute=float16", "precision.loss_scale=static", "precision.initial_scale=1"),
}
MOVED = {f"float32, start moved ({seed})": seed for seed in (1, 2, 3)}
NARROW = {
    "llama": ("d_model=64", "d_ff=160", "num_layers=2", "num_heads=4", "num_kv_heads=2", "vocab_size=512"),
    "t5": ("d_model=64", "d_ff=160", "num_layers=2", "num_heads=2", "vocab_size=768"),
}
# T5 with v1.0's tied and scaled head, an example a row, over a cosine.
ORIGINAL = {
    "llama": (),
    "t5": (
        "model.tie_embeddings=true",
        "model.scale_logits=true",
        "data.sequence_length=128",
        "data.target_length=null",
        "data.example_length=null",
        "optimizer.schedule=cosine",
    ),
}
SCALES = (0, 8, 16)  # exponents of 2


def main() -> None:
    """Runs everything one after the other and writes one JSON and three pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(NARROW), default=list(NARROW))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--full", action="store_true", help="models as wide as the configs'")
    arguments = parser.parse_args()
    IMAGES.mkdir(parents=True, exist_ok=True)
    families = {}
    with tempfile.TemporaryDirectory() as work:
        for family in arguments.families:
            families[family] = measure_family(family, arguments.steps, arguments.full, Path(work))
    result = {"benchmark": "precision", "steps": arguments.steps, "full": arguments.full, **environment()}
    result["families"] = {name: summary(runs, lost) for name, (runs, lost) in families.items()}
    save("precision", result)
    runs, lost = ({name: found[part] for name, found in families.items()} for part in (0, 1))
    save_picture("precision_losses", plot_losses, runs)
    save_picture("precision_gradients", plot_lost, lost)
    save_picture("precision_scale", plot_scales, runs)
    print(json.dumps(result["families"], indent=1))


def run_config(family: str, run: str, steps: int, full: bool, work: Path) -> RunConfig:
    """The config of one run."""
    narrow = () if full else ("data.sequence_length=64", *(f"model.{setting}" for setting in NARROW[family]))
    settings = (
        f"training.run_dir={work / family}",
        f"training.steps={steps}",
        f"optimizer.warmup_steps={steps // 6}",
        f"optimizer.decay_steps={steps // 5 if family == 'llama' else 0}",
        "model.layers=scan",
    )
    return load_config(ROOT / "configs" / f"{family}_tiny.yaml", (*settings, *ORIGINAL[family], *narrow, *RUNS[run]))


def measure_family(family: str, steps: int, full: bool, work: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Curve and last validation of every run, and the lost gradients of the float32 one."""
    config = run_config(family, "float32", steps, full, work)
    (work / family).mkdir()
    with contextlib.closing(open_run_pipeline(config, work / family)) as pipeline:
        batches = [next(pipeline) for _ in range(steps)]
        validation = list(pipeline.validation(config.training.eval_batches))
    runs = {}
    for run in (*RUNS, *MOVED):
        settings = run_config(family, run if run in RUNS else "float32", steps, full, work)
        runs[run] = train(settings, batches, validation, moved=MOVED.get(run))
        result = runs[run]
        print(f"{family}, {run}: validation {result['validation']:.4f}, {result['seconds']:.0f} s", flush=True)
    return runs, lost_gradients(config, runs["float32"].pop("params"), batches[0])


def train(config: RunConfig, batches: list[Any], validation: list[Any], *, moved: int | None = None) -> dict[str, Any]:
    """One run over the batches: rows of metrics, the validation loss per token, seconds per step, parameters."""
    model, dtype = build_model(config), jnp.dtype(config.precision.compute)
    rule = build_optimizer(config.optimizer, config.precision, steps=config.training.steps)
    loss = build_loss(model, config.training)
    step = jax.jit(make_train_step(loss, rule, accumulation=1, dtype=dtype), donate_argnums=0)
    evaluate = jax.jit(make_eval_step(loss, dtype=dtype))
    key, run_key = jax.random.split(jax.random.key(config.training.seed))
    params = init_params(model, key)
    if moved is not None:
        params = _moved(params, jax.random.key(moved))
    state = init_train_state(params, rule, run_key)
    watch = OverflowWatch(program_of(config), state.params)
    rows, seconds, before = [], [], time.perf_counter()
    for i, batch in enumerate(batches, 1):
        started = time.perf_counter()
        state, metrics = step(state, batch)
        values = {name: value.item() for name, value in jax.device_get(metrics)._asdict().items()}
        seconds.append(time.perf_counter() - started)
        room = watch.headroom(i, state, batch) if i % 25 == 0 else {}
        rows.append({"step": i, **values, **({"headroom": min(room.values())} if room else {})})
    sums = [jax.device_get(evaluate(state.params, batch)) for batch in validation]
    return {
        "rows": rows,
        "validation": float(sum(s.nll for s in sums) / sum(s.weight for s in sums)),
        "step_seconds": statistics.median(seconds[5:]),
        "seconds": time.perf_counter() - before,
        "params": state.params,
    }


def _moved(params: Any, key: Any) -> Any:
    """Each parameter times 1 + a normal number of a thousandth: more than float16 rounds it by, less than bfloat16."""
    structure = jax.tree.structure(params)
    keys = structure.unflatten(list(jax.random.split(key, structure.num_leaves)))
    return jax.tree.map(lambda leaf, own: leaf * (1 + 1e-3 * jax.random.normal(own, leaf.shape)), params, keys)


def lost_gradients(config: RunConfig, params: Any, batch: Any) -> dict[str, Any]:
    """Histogram of the exponents of all weight gradients of a trained model, and the fraction that float16 loses."""
    exact = _gradients(config, jnp.float32, params, batch, 0)
    there = exact != 0  # tokens that are not in the batch have none
    exponents, counts = np.unique(np.floor(np.log2(np.abs(exact[there]))).astype(int), return_counts=True)
    lost = {
        scale: float(np.mean(_gradients(config, jnp.float16, params, batch, scale)[there] == 0)) for scale in SCALES
    }
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
    base = runs["float32"]["validation"]
    table = {
        name: {
            "validation_loss": run["validation"],
            "ratio_to_float32": run["validation"] / base,
            **{key: run["rows"][-1][key] for key in ("loss_scale", "skipped")},
            "step_seconds": run["step_seconds"],
            "seconds": run["seconds"],
        }
        for name, run in runs.items()
    }
    return {"runs": table, "gradients": lost}


def plot_losses(axis: Any, runs: dict[str, Any]) -> str:
    """Training loss of every run."""
    styles = {"float32": {"color": "black", "linewidth": 2.5}, "float16, scale 1": {"linestyle": "--"}}
    for name in RUNS:
        losses = np.convolve([row["loss"] for row in runs[name]["rows"]], np.ones(5) / 5, mode="valid")
        label = f"{name}: {runs[name]['validation']:.4f}"
        axis.plot(range(5, 5 + len(losses)), losses, label=label, **styles.get(name, {"linewidth": 1}))
    axis.set(xlabel="step", yscale="log")
    return "training loss (legend: last validation)"


def plot_lost(axis: Any, found: dict[str, Any]) -> str:
    """Exponents of gradients next to the range of float16 at each scale."""
    counts = np.array(found["counts"])
    axis.bar(found["exponents"], counts / counts.sum(), width=1, color="0.6")
    for scale, color in zip(SCALES, ("tab:red", "tab:orange", "tab:green"), strict=True):
        axis.axvline(-24 - scale, color=color, label=f"scale 2^{scale}: {found['lost'][scale]:.1%} lost")
    axis.set(xlabel="exponent of 2; left of a line float16 has only 0")
    return "weight gradients"


def plot_scales(axis: Any, runs: dict[str, Any]) -> str:
    """Loss scale over time, and the least headroom of any block's activations."""
    rows = runs["float16, dynamic scale"]["rows"]
    axis.plot([row["step"] for row in rows], [np.log2(row["loss_scale"]) for row in rows], label="log2 of the scale")
    room = [(row["step"], row["headroom"]) for row in rows if "headroom" in row]
    axis.plot(*zip(*room, strict=True), label="least headroom of activations (bits)")
    axis.set(xlabel="step", ylim=(0, None))
    return "float16, dynamic scale"


def save_picture(name: str, plot: Callable[[Any, Any], str], families: dict[str, Any]) -> None:
    """A picture with one panel per family; `plot` fills it and returns its title."""
    figure, axes = plt.subplots(1, len(families), figsize=(9, 3.4), squeeze=False)
    for axis, (family, found) in zip(axes[0], families.items(), strict=True):
        axis.set_title(f"{family}: {plot(axis, found)}")
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(IMAGES / f"{name}.png", dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    main()
