"""Training throughput against transformers on torch: same shapes, same random weights, logits compared first.

    python benchmarks/train_step.py --shape A --dtype float32        needs the extras `parity`

Each side (ours, torch eager, torch compiled) runs in its own process, in turns, because a machine's speed drifts; the
ratio is taken within each turn. torch runs as `torch_models.train_step` does: SDPA, no cache, fused AdamW, autocast for
bfloat16; compiled, the forward pass and the loss are one function of static shapes. All sides clip the global norm and
decay weights. Tokens are those of sources and targets; no dropout, no masks. `product_gflops` is the speed of each
side's library at one matrix product of the model, most of whose step such products are: their ratio depends on the CPU.
Results go to benchmarks/results/train_step_*.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sides import SHAPES, environment, ratios, run_side, save, shown, spread

from jaxllm.config import LlamaConfig, ModelConfig, OptimizerConfig, PrecisionConfig, TrainingConfig

SIDES = ("jaxllm", "torch_eager", "torch_compile")
BATCHES = {  # rows, length of the source, of T5's target
    "A": (8, 256, 0),
    "B": (4, 512, 0),
    "toy": (2, 32, 0),
    "TA": (8, 256, 64),
    "toy_t5": (2, 32, 16),
}
_PRODUCT = "product_gflops"


def main() -> None:
    """Alternates the sides and writes the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(BATCHES), default="A")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a side in a turn")
    parser.add_argument("--turns", type=int, default=2, help="turns of all sides")
    parser.add_argument("--side", choices=SIDES, help="run one side in this process")
    parser.add_argument("--work", type=Path, help="folder the sides share")
    arguments = parser.parse_args()
    if arguments.side:
        side = run_jaxllm if arguments.side == "jaxllm" else functools.partial(run_torch, arguments.side)
        print(json.dumps(side(arguments.shape, arguments.dtype, arguments.steps, arguments.work)))
        return
    with tempfile.TemporaryDirectory() as work:
        turns = [{side: run_side(side, work) for side in SIDES} for _ in range(arguments.turns)]
        difference = compare(Path(work), turns[0], arguments.dtype)
    result = {
        "benchmark": "train_step",
        "shape": arguments.shape,
        "dtype": arguments.dtype,
        "ratio": ratios(turns, SIDES[1:]),
        "ratio_of_products": spread([turn["jaxllm"][_PRODUCT] / turn["torch_eager"][_PRODUCT] for turn in turns]),
        "logits_relative_difference": difference,
        "turns": turns,
        **environment(),
    }
    path = save(f"train_step_{arguments.shape}_{arguments.dtype}", result)
    print(f"{path.name}: {shown(result['ratio'])}; products alone {result['ratio_of_products']['median']:.2f}x")


def compare(work: Path, turn: dict[str, Any], dtype: str) -> float:
    """Largest difference of the logits; stops unless they and the losses of the first step agree."""
    ours, *others = (np.load(work / f"{side}.npy") for side in SIDES)
    difference = max(float(np.abs(ours - theirs).max() / np.abs(theirs).max()) for theirs in others)
    losses = [turn[side]["first_loss"] for side in SIDES]
    apart = (max(losses) - min(losses)) / max(losses)
    if max(difference, apart) > (2e-4 if dtype == "float32" else 5e-2):
        raise SystemExit(f"logits differ by {difference}, losses by {apart}: a speed of a wrong model says nothing")
    return difference


def _config(shape: str) -> ModelConfig:
    config = dataclasses.replace(SHAPES[shape], layers="unroll")
    return dataclasses.replace(config, max_length=BATCHES[shape][1]) if isinstance(config, LlamaConfig) else config


def _batch(shape: str) -> dict[str, np.ndarray]:
    """Random documents without padding, as the data pipeline makes them; for T5 a source and a target each."""
    rng, vocab = np.random.default_rng(0), SHAPES[shape].vocab_size
    rows, source, target = BATCHES[shape]
    if target:
        tokens = rng.integers(1, vocab, (rows, source + target)).astype(np.int32)
        targets = tokens[:, source:]
        return {
            "encoder_tokens": tokens[:, :source],
            "encoder_lengths": np.full(rows, source, np.int32),
            "decoder_tokens": np.concatenate([np.zeros((rows, 1), np.int32), targets[:, :-1]], axis=1),
            "targets": targets,
            "weights": np.ones((rows, target), np.float32),
        }
    tokens = rng.integers(0, vocab, (rows, source + 1)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.tile(np.arange(source, dtype=np.int32), (rows, 1)),
        "segment_ids": np.ones((rows, source), np.int32),
        "weights": np.ones((rows, source), np.float32),
    }


def _inputs(batch: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [batch[name] for name in ("tokens", "encoder_tokens", "decoder_tokens") if name in batch]


def run_jaxllm(shape: str, dtype: Any, steps: int, work: Path) -> dict[str, Any]:
    """Times our step; saves weights for the other sides and logits for the comparison."""
    import jax

    from jaxllm.interop.hf import save_hf
    from jaxllm.models import build, init_params
    from jaxllm.models.layers import apply
    from jaxllm.training.loss import build_loss
    from jaxllm.training.optimizer import build_optimizer
    from jaxllm.training.train_step import init_train_state, make_train_step

    compute = jax.numpy.dtype(dtype)
    model = build(_config(shape), dtype=compute)
    params = init_params(model, jax.random.key(0))
    batch = _batch(shape)
    save_hf(work / "model", model, params)
    logits = jax.jit(lambda p, *x: apply(model, p, *x))(params, *(x[:1] for x in _inputs(batch)))
    np.save(work / "jaxllm.npy", np.asarray(logits))
    optimizer = build_optimizer(OptimizerConfig(schedule="constant"), PrecisionConfig(), steps=1000)
    loss = build_loss(model, TrainingConfig(loss_chunk=1024))
    step = jax.jit(make_train_step(loss, optimizer, accumulation=1, dtype=compute), donate_argnums=0)
    state = init_train_state(params, optimizer, jax.random.key(1))
    before = time.perf_counter()
    state, metrics = jax.block_until_ready(step(state, batch))
    first, first_loss, times = time.perf_counter() - before, float(metrics.loss), []
    for _ in range(steps):
        before = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, batch))
        times.append(time.perf_counter() - before)
    x, kernel = (jax.numpy.asarray(a, compute) for a in _factors(shape))
    product = jax.jit(lambda a, b: jax.numpy.dot(a, b, preferred_element_type=jax.numpy.float32))
    speed = _gflops(lambda: jax.block_until_ready(product(x, kernel)), shape)
    return _result(times, sum(x.size for x in _inputs(batch)), first, [first_loss, float(metrics.loss)], speed)


def run_torch(side: str, shape: str, dtype: str, steps: int, work: Path) -> dict[str, Any]:
    """Times transformers' model with the weights that our side saved."""
    import torch
    import torch_models

    model, autocast, batch = torch_models.model_of(work / "model").train(), dtype == "bfloat16", _batch(shape)
    inputs, targets = torch_models.inputs_of(_inputs(batch)), torch.tensor(batch["targets"], dtype=torch.long)
    targets = targets.to(torch_models.DEVICE)
    with torch.no_grad(), torch.autocast(torch_models.DEVICE, dtype=torch.bfloat16, enabled=autocast):
        logits = model(**{name: x[:1] for name, x in inputs.items()}, use_cache=False).logits
    np.save(work / f"{side}.npy", logits.float().cpu().numpy())
    step = torch_models.train_step(model, autocast=autocast, mode="default" if side == "torch_compile" else None)
    losses: list[torch.Tensor] = []
    first, *times = torch_models.timed(lambda: losses.append(step(inputs, targets)), warm=0, count=steps + 1)
    x, kernel = (torch.tensor(a, dtype=getattr(torch, dtype), device=torch_models.DEVICE) for a in _factors(shape))
    speed = _gflops(lambda: float((x @ kernel)[0, 0]), shape)
    return _result(times, sum(x.size for x in _inputs(batch)), first, [float(losses[0]), float(losses[-1])], speed)


def _factors(shape: str) -> tuple[np.ndarray, np.ndarray]:
    """The factors of the product into an MLP's hidden layer, over all tokens of a batch (a source's, of T5)."""
    rng, rows = np.random.default_rng(0), _inputs(_batch(shape))[0].size
    width, outputs = SHAPES[shape].d_model, SHAPES[shape].d_ff
    return rng.standard_normal((rows, width), np.float32), rng.standard_normal((width, outputs), np.float32)


def _gflops(multiply: Callable[[], Any], shape: str) -> float:
    times = []
    for _ in range(50):
        before = time.perf_counter()
        multiply()
        times.append(time.perf_counter() - before)
    x, kernel = _factors(shape)
    return 2e-9 * x.size * kernel.shape[1] / statistics.median(times)


def _result(times: list[float], tokens: int, first: float, losses: list[float], speed: float) -> dict[str, Any]:
    ordered = sorted(times)
    return {
        "tokens_per_second": tokens / statistics.median(times),
        "p10_p90_seconds": [ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]],
        "first_step_seconds": first,
        "first_loss": losses[0],
        "loss": losses[1],
        _PRODUCT: speed,
    }


if __name__ == "__main__":
    main()
