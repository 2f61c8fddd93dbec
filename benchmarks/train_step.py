"""Training throughput beside transformers on torch: same shapes, same random weights, logits compared first.

    python benchmarks/train_step.py --shape A --dtype float32        needs the extras `parity`

Each side runs in its own process, alternating (ours, torch, ours, torch), because a machine's speed drifts; the ratio
is taken within each pair. torch is eager: LlamaForCausalLM with SDPA, AdamW (fused where it exists), autocast for
bfloat16. Both sides clip the global norm and decay weights. Results go to benchmarks/results/train_step_*.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.config import LlamaConfig, OptimizerConfig, PrecisionConfig, TrainingConfig

RESULTS = Path(__file__).parent / "results"
SHAPES: dict[str, dict[str, int]] = {
    "A": {
        "vocab_size": 8192,
        "d_model": 256,
        "d_ff": 688,
        "num_layers": 4,
        "num_heads": 8,
        "num_kv_heads": 4,
    },
    "B": {
        "vocab_size": 32000,
        "d_model": 512,
        "d_ff": 1376,
        "num_layers": 8,
        "num_heads": 8,
        "num_kv_heads": 4,
    },
    "toy": {
        "vocab_size": 512,
        "d_model": 64,
        "d_ff": 128,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
    },
}
BATCHES = {"A": (8, 256), "B": (4, 512), "toy": (2, 32)}


def main() -> None:
    """Alternates the two sides and writes the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="A")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a side in a turn")
    parser.add_argument("--turns", type=int, default=2, help="pairs of turns")
    parser.add_argument("--side", choices=["jaxllm", "torch"], help="run one side in this process")
    parser.add_argument("--work", type=Path, help="folder the two sides share")
    arguments = parser.parse_args()
    if arguments.side:
        side = run_jaxllm if arguments.side == "jaxllm" else run_torch
        print(json.dumps(side(arguments.shape, arguments.dtype, arguments.steps, arguments.work)))
        return
    with tempfile.TemporaryDirectory() as work:
        turns = [{side: _turn(side, arguments, work) for side in ("jaxllm", "torch")} for _ in range(arguments.turns)]
        difference = _compare_logits(Path(work), arguments.dtype)
    ratios = [turn["jaxllm"]["tokens_per_second"] / turn["torch"]["tokens_per_second"] for turn in turns]
    result = {
        "benchmark": "train_step",
        "shape": arguments.shape,
        "dtype": arguments.dtype,
        "ratio": {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)},
        "logits_relative_difference": difference,
        "turns": turns,
        **environment(),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"train_step_{arguments.shape}_{arguments.dtype}_{result['device'].replace(' ', '_')}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{path.name}: ratio {result['ratio']}, logits differ by {difference:.1e}")


def environment() -> dict[str, Any]:
    """Device, versions, commit and date of a result."""
    import importlib.metadata as metadata

    import jax

    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent, check=False).stdout.strip()
    packages = ("jax", "flax", "optax", "torch", "transformers")
    installed = {dist.metadata["Name"] for dist in metadata.distributions()}
    return {
        "device": jax.devices()[0].device_kind,
        "versions": {name: metadata.version(name) for name in packages if name in installed},
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def _turn(side: str, arguments: argparse.Namespace, work: str) -> dict[str, Any]:
    options = {
        "--shape": arguments.shape,
        "--dtype": arguments.dtype,
        "--steps": arguments.steps,
        "--work": work,
    }
    flat = [str(part) for pair in options.items() for part in pair]
    output = subprocess.run(
        [sys.executable, __file__, "--side", side, *flat], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return json.loads(output.splitlines()[-1])


def _compare_logits(work: Path, dtype: str) -> float:
    ours, theirs = np.load(work / "jaxllm.npy"), np.load(work / "torch.npy")
    difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if difference > (2e-4 if dtype == "float32" else 5e-2):
        raise SystemExit(f"the two models differ by {difference}: a speed of a wrong model says nothing")
    return difference


def _tokens(shape: str) -> np.ndarray:
    batch, length = BATCHES[shape]
    return np.random.default_rng(0).integers(0, SHAPES[shape]["vocab_size"], (batch, length + 1)).astype(np.int32)


def run_jaxllm(shape: str, dtype: str, steps: int, work: Path) -> dict[str, Any]:
    """Times our step; saves weights for the other side and logits for the comparison."""
    import jax

    from jaxllm.models import build, init_params
    from jaxllm.training.loss import build_loss
    from jaxllm.training.optimizer import build_optimizer
    from jaxllm.training.precision import compute_dtype
    from jaxllm.training.train_step import init_train_state, make_train_step

    compute = compute_dtype(PrecisionConfig(compute=dtype))
    batch, length = BATCHES[shape]
    config = LlamaConfig(**SHAPES[shape], layers="unroll", max_length=length)
    model = build(config, dtype=compute)
    params = init_params(model, jax.random.key(0))
    tokens = _tokens(shape)
    flat = {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}
    np.savez(work / "weights.npz", **flat)
    logits = jax.jit(lambda p, t: model.apply({"params": p}, t))(params, tokens[:1, :-1])
    np.save(work / "jaxllm.npy", np.asarray(logits))
    optimizer = build_optimizer(OptimizerConfig(schedule="constant"), PrecisionConfig(), steps=1000)
    loss = build_loss(model, TrainingConfig(loss_chunk=256))
    step = jax.jit(make_train_step(loss, optimizer, accumulation=1, dtype=compute), donate_argnums=0)
    state = init_train_state(params, optimizer, jax.random.key(1))
    data = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.tile(np.arange(length, dtype=np.int32), (batch, 1)),
        "segment_ids": np.ones((batch, length), np.int32),
        "weights": np.ones((batch, length), np.float32),
    }
    before = time.perf_counter()
    state, metrics = jax.block_until_ready(step(state, data))
    first = time.perf_counter() - before
    times = []
    for _ in range(steps):
        before = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, data))
        times.append(time.perf_counter() - before)
    return _result(times, batch * length, first, float(metrics.loss))


def run_torch(shape: str, dtype: str, steps: int, work: Path) -> dict[str, Any]:
    """Times transformers' model with the weights that our side saved."""
    import torch
    from transformers import LlamaForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM(_torch_config(shape)).to(device)
    _copy_weights(model, np.load(work / "weights.npz"))
    tokens = torch.tensor(_tokens(shape), dtype=torch.long, device=device)
    cast = torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16")
    with torch.no_grad(), cast:
        np.save(work / "torch.npy", model(tokens[:1, :-1]).logits.float().cpu().numpy())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    times, loss = [], torch.zeros(())
    for _ in range(steps + 1):
        before = time.perf_counter()
        with cast:
            logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - before)
    batch, length = BATCHES[shape]
    return _result(times[1:], batch * length, times[0], float(loss.detach()))


def _torch_config(shape: str) -> Any:
    from transformers import LlamaConfig as TorchConfig

    c = SHAPES[shape]
    return TorchConfig(
        vocab_size=c["vocab_size"],
        hidden_size=c["d_model"],
        intermediate_size=c["d_ff"],
        num_hidden_layers=c["num_layers"],
        num_attention_heads=c["num_heads"],
        num_key_value_heads=c["num_kv_heads"],
        max_position_embeddings=BATCHES[shape][1],
        rms_norm_eps=1e-5,
        use_cache=False,
    )


def _copy_weights(model: Any, weights: Any) -> None:
    import torch

    state = {}
    for name in model.state_dict():
        parts = name.removeprefix("model.").split(".")
        if parts[0] == "layers":
            norm = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}.get(parts[2])
            key = f"['layers']['{norm or parts[3]}']['{'weight' if norm else 'kernel'}']"
            value = weights[key][int(parts[1])]
            state[name] = torch.tensor(value if norm else value.T.copy())
        else:
            key = {"embed_tokens": "['embed']", "norm": "['final_norm']['weight']", "lm_head": "['lm_head']"}[parts[0]]
            state[name] = torch.tensor(weights[key])
    model.load_state_dict(state)


def _result(times: list[float], tokens: int, first: float, loss: float) -> dict[str, Any]:
    ordered = sorted(times)
    return {
        "tokens_per_second": tokens / statistics.median(times),
        "p10_p90_seconds": [ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]],
        "first_step_seconds": first,
        "loss": loss,
    }


if __name__ == "__main__":
    main()
