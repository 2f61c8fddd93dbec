"""Training throughput beside transformers on torch: same shapes, same random weights, logits compared first.

    python benchmarks/train_step.py --shape A --dtype float32        needs the extras `parity`

Each side runs in its own process, alternating (ours, torch, ours, torch), because a machine's speed drifts; the ratio
is taken within each pair. torch is eager: LlamaForCausalLM or T5ForConditionalGeneration with SDPA, AdamW (fused
where it exists), autocast for bfloat16, no masks. Both sides clip the global norm and decay weights. Tokens are those
of sources and targets; no dropout. `product_gflops` is the speed of each side's library at one matrix product of the
model, most of whose step such products are: their ratio depends on the CPU. Results go to
benchmarks/results/train_step_*.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sides import environment, run_side, save, spread

from jaxllm.config import LlamaConfig, OptimizerConfig, PrecisionConfig, T5Config, TrainingConfig

SHAPES: dict[str, dict[str, Any]] = {
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
    "TA": {  # v1.1
        "vocab_size": 8192,
        "d_model": 256,
        "d_ff": 688,
        "num_layers": 4,
        "num_heads": 8,
        "head_dim": 32,
    },
    "toy_t5": {
        "vocab_size": 512,
        "d_model": 64,
        "d_ff": 128,
        "num_layers": 2,
        "num_heads": 4,
        "head_dim": 16,
    },
}
BATCHES = {"A": (8, 256), "B": (4, 512), "toy": (2, 32)}  # rows, length
_PRODUCT = "product_gflops"
T5_BATCHES = {"TA": (8, 256, 64), "toy_t5": (2, 32, 16)}  # rows, length of the source, of the target


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
        turns = [{side: run_side(side, work) for side in ("jaxllm", "torch")} for _ in range(arguments.turns)]
        difference = _compare_logits(Path(work), arguments.dtype)
    ratios = [turn["jaxllm"]["tokens_per_second"] / turn["torch"]["tokens_per_second"] for turn in turns]
    result = {
        "benchmark": "train_step",
        "shape": arguments.shape,
        "dtype": arguments.dtype,
        "ratio": spread(ratios),
        "ratio_of_products": spread([turn["jaxllm"][_PRODUCT] / turn["torch"][_PRODUCT] for turn in turns]),
        "logits_relative_difference": difference,
        "turns": turns,
        **environment(),
    }
    path = save(f"train_step_{arguments.shape}_{arguments.dtype}", result)
    print(f"{path.name}: ratio {result['ratio']}, of products alone {result['ratio_of_products']['median']:.2f}")


def _compare_logits(work: Path, dtype: str) -> float:
    ours, theirs = np.load(work / "jaxllm.npy"), np.load(work / "torch.npy")
    difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if difference > (2e-4 if dtype == "float32" else 5e-2):
        raise SystemExit(f"the two models differ by {difference}: a speed of a wrong model says nothing")
    return difference


def _config(shape: str) -> LlamaConfig | T5Config:
    if shape in T5_BATCHES:
        return T5Config(**SHAPES[shape], layers="unroll")
    return LlamaConfig(**SHAPES[shape], layers="unroll", max_length=BATCHES[shape][1])


def _batch(shape: str) -> dict[str, np.ndarray]:
    """Random documents without padding, as the data pipeline makes them; for T5 a source and a target each."""
    rng, vocab = np.random.default_rng(0), SHAPES[shape]["vocab_size"]
    if shape in T5_BATCHES:
        rows, source, target = T5_BATCHES[shape]
        tokens = rng.integers(1, vocab, (rows, source + target)).astype(np.int32)
        targets = tokens[:, source:]
        return {
            "encoder_tokens": tokens[:, :source],
            "encoder_lengths": np.full(rows, source, np.int32),
            "decoder_tokens": np.concatenate([np.zeros((rows, 1), np.int32), targets[:, :-1]], axis=1),
            "targets": targets,
            "weights": np.ones((rows, target), np.float32),
        }
    rows, length = BATCHES[shape]
    tokens = rng.integers(0, vocab, (rows, length + 1)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "segment_ids": np.ones((rows, length), np.int32),
        "weights": np.ones((rows, length), np.float32),
    }


def _inputs(batch: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [batch[name] for name in ("tokens", "encoder_tokens", "decoder_tokens") if name in batch]


def run_jaxllm(shape: str, dtype: Any, steps: int, work: Path) -> dict[str, Any]:
    """Times our step; saves weights for the other side and logits for the comparison."""
    import jax

    from jaxllm.interop.hf import save_hf
    from jaxllm.models import build, init_params
    from jaxllm.models.layers import apply
    from jaxllm.training.loss import build_loss
    from jaxllm.training.optimizer import build_optimizer
    from jaxllm.training.precision import compute_dtype
    from jaxllm.training.train_step import init_train_state, make_train_step

    compute = compute_dtype(PrecisionConfig(compute=dtype))
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
    first = time.perf_counter() - before
    times = []
    for _ in range(steps):
        before = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, batch))
        times.append(time.perf_counter() - before)
    x, kernel = (jax.numpy.asarray(a, compute) for a in _factors(shape))
    product = jax.jit(lambda a, b: jax.numpy.dot(a, b, preferred_element_type=jax.numpy.float32))
    speed = _gflops(lambda: jax.block_until_ready(product(x, kernel)), shape)
    return _result(times, sum(x.size for x in _inputs(batch)), first, float(metrics.loss), speed)


def run_torch(shape: str, dtype: str, steps: int, work: Path) -> dict[str, Any]:
    """Times transformers' model with the weights that our side saved."""
    import torch
    from transformers import LlamaForCausalLM, T5ForConditionalGeneration

    device = "cuda" if torch.cuda.is_available() else "cpu"
    cls: Any = T5ForConditionalGeneration if shape in T5_BATCHES else LlamaForCausalLM
    model: Any = cls.from_pretrained(work / "model", dtype=torch.float32).to(device).train()
    batch = _batch(shape)
    names = ("input_ids", "decoder_input_ids")
    inputs = {k: torch.tensor(x, dtype=torch.long, device=device) for k, x in zip(names, _inputs(batch), strict=False)}
    targets = torch.tensor(batch["targets"], dtype=torch.long, device=device)
    cast = torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16")
    with torch.no_grad(), cast:
        first_row = {name: x[:1] for name, x in inputs.items()}
        np.save(work / "torch.npy", model(**first_row, use_cache=False).logits.float().cpu().numpy())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    times, loss = [], torch.zeros(())
    for _ in range(steps + 1):
        before = time.perf_counter()
        with cast:
            logits = model(**inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - before)
    x, kernel = (torch.tensor(a, dtype=getattr(torch, dtype), device=device) for a in _factors(shape))
    speed = _gflops(lambda: float((x @ kernel)[0, 0]), shape)
    return _result(times[1:], sum(x.size for x in _inputs(batch)), times[0], float(loss.detach()), speed)


def _factors(shape: str) -> tuple[np.ndarray, np.ndarray]:
    """The factors of the product into an MLP's hidden layer, over all tokens of a batch (a source's, of T5)."""
    rng, rows = np.random.default_rng(0), _inputs(_batch(shape))[0].size
    width, outputs = SHAPES[shape]["d_model"], SHAPES[shape]["d_ff"]
    return rng.standard_normal((rows, width), np.float32), rng.standard_normal((width, outputs), np.float32)


def _gflops(multiply: Callable[[], Any], shape: str) -> float:
    times = []
    for _ in range(50):
        before = time.perf_counter()
        multiply()
        times.append(time.perf_counter() - before)
    x, kernel = _factors(shape)
    return 2e-9 * x.size * kernel.shape[1] / statistics.median(times)


def _result(times: list[float], tokens: int, first: float, loss: float, product_gflops: float) -> dict[str, Any]:
    ordered = sorted(times)
    return {
        "tokens_per_second": tokens / statistics.median(times),
        "p10_p90_seconds": [ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]],
        "first_step_seconds": first,
        "loss": loss,
        _PRODUCT: product_gflops,
    }


if __name__ == "__main__":
    main()
