"""Training throughput against transformers on torch: same shapes, same random weights, logits compared first.

    python -m benchmarks.train_step --shape A --dtype float32        needs the extras `parity`

Each side (ours, torch eager, torch compiled) runs in its own process, in turns, because a machine's speed drifts; the
ratio is taken within each turn. torch runs as `torch_models.train_step` does: SDPA, no cache, fused AdamW, autocast for
bfloat16; compiled, the forward pass and the loss are one function of static shapes. All sides clip the global norm and
decay weights. Tokens are those of sources and targets; no dropout, no masks. `product_gflops` is the speed of each
side's library at one matmul of the model. Matmuls are most of a step, and their ratio depends on the CPU.
Results go to benchmarks/results/train_step_*.json.
"""

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu import train
from benchmarks.report import spread
from benchmarks.sides import environment, ratios, run_side, save, shown
from jaxllm.config import RunConfig
from jaxllm.config.file import with_overrides

SIDES = ("jaxllm", "torch_eager", "torch_compile")
CASES = {
    "A": train.Case("A", 8, 256, remat="none"),
    "B": train.Case("B", 4, 512, remat="none"),
    "toy": train.Case("toy", 2, 32, remat="none"),
    "TA": train.Case("TA", 8, 256, 64, remat="none"),
    "toy_t5": train.Case("toy_t5", 2, 32, 16, remat="none"),
}
_PRODUCT = "product_gflops"


def main() -> None:
    """Alternates the sides and writes the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(CASES), default="A")
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
    print(f"{path.name}: {shown(result['ratio'])}; matmuls alone {result['ratio_of_products']['median']:.2f}x")


def compare(work: Path, turn: dict[str, Any], dtype: str) -> float:
    """Largest difference of the logits; stops unless they and the losses of the first step agree."""
    ours, *others = (np.load(work / f"{side}.npy") for side in SIDES)
    difference = max(float(np.abs(ours - theirs).max() / np.abs(theirs).max()) for theirs in others)
    losses = [turn[side]["first_loss"] for side in SIDES]
    apart = (max(losses) - min(losses)) / max(losses)
    if max(difference, apart) > (2e-4 if dtype == "float32" else 5e-2):
        raise SystemExit(f"logits differ by {difference}, losses by {apart}: the speed of a wrong model means nothing")
    return difference


def run_config(shape: str, dtype: str) -> RunConfig:
    """The run of a shape, as `benchmarks.gpu.train` makes those of its cases; AdamW, as on the other side."""
    case = CASES[shape]._replace(compute=dtype, settings=("optimizer.name=adamw", "training.loss_chunk=1024"))
    return with_overrides(train.run_config(case, toy=False), ["data.document_mask=true"])


def _batch(config: RunConfig) -> dict[str, np.ndarray]:
    return train.synthetic_batch(config, documents=1)


def _inputs(batch: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [batch[name] for name in ("tokens", "encoder_tokens", "decoder_tokens") if name in batch]


def run_jaxllm(shape: str, dtype: str, steps: int, work: Path) -> dict[str, Any]:
    """Times our step; saves weights for the other sides and logits for the comparison."""
    import jax

    from jaxllm.interop.hf import save_hf
    from jaxllm.models.layers import apply

    config = run_config(shape, dtype)
    batch = _batch(config)
    program, step, compile_seconds = train.compile_step(config, batch)
    state = jax.jit(program.fresh_state)()
    save_hf(work / "model", program.model, state.params)
    logits = jax.jit(lambda p, *x: apply(program.model, p, *x))(state.params, *(x[:1] for x in _inputs(batch)))
    np.save(work / "jaxllm.npy", np.asarray(logits))
    times, losses = [], []
    for _ in range(steps + 1):
        before = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, batch))
        times.append(time.perf_counter() - before)
        losses.append(float(metrics.loss))
    x, kernel = (jax.numpy.asarray(a, program.dtype) for a in _factors(config))
    product = jax.jit(lambda a, b: jax.numpy.dot(a, b, preferred_element_type=jax.numpy.float32))
    speed = _gflops(lambda: jax.block_until_ready(product(x, kernel)), config)
    return _result(times, compile_seconds, losses, _tokens(batch), speed)


def run_torch(side: str, shape: str, dtype: str, steps: int, work: Path) -> dict[str, Any]:
    """Times transformers' model with the weights that our side saved."""
    import torch

    from benchmarks import torch_models

    config = run_config(shape, dtype)
    model, autocast, batch = torch_models.model_of(work / "model").train(), dtype == "bfloat16", _batch(config)
    inputs = torch_models.inputs_of(_inputs(batch))
    targets = torch.tensor(batch["targets"], dtype=torch.long, device=torch_models.DEVICE)
    with torch.no_grad(), torch.autocast(torch_models.DEVICE, dtype=torch.bfloat16, enabled=autocast):
        logits = model(**{name: x[:1] for name, x in inputs.items()}, use_cache=False).logits
    np.save(work / f"{side}.npy", logits.float().cpu().numpy())
    step = torch_models.train_step(model, autocast=autocast, mode="default" if side == "torch_compile" else None)
    losses: list[torch.Tensor] = []
    times = torch_models.timed(lambda: losses.append(step(inputs, targets)), warm=0, count=steps + 1)
    x, kernel = (torch.tensor(a, dtype=getattr(torch, dtype), device=torch_models.DEVICE) for a in _factors(config))
    speed = _gflops(lambda: float((x @ kernel)[0, 0]), config)
    return _result(times, 0.0, [float(loss) for loss in losses], _tokens(batch), speed)


def _tokens(batch: dict[str, np.ndarray]) -> int:
    return sum(x.size for x in _inputs(batch))


def _factors(config: RunConfig) -> tuple[np.ndarray, np.ndarray]:
    """The operands of the matmul into an MLP's hidden layer, over all tokens of a batch (a source's, of T5)."""
    rng, rows = np.random.default_rng(0), config.training.batch_size * config.data.sequence_length
    model: Any = config.model
    width, outputs = model.d_model, model.d_ff
    return rng.standard_normal((rows, width), np.float32), rng.standard_normal((width, outputs), np.float32)


def _gflops(multiply: Callable[[], Any], config: RunConfig) -> float:
    times = []
    for _ in range(50):
        before = time.perf_counter()
        multiply()
        times.append(time.perf_counter() - before)
    x, kernel = _factors(config)
    return 2e-9 * x.size * kernel.shape[1] / statistics.median(times)


def _result(
    times: list[float], compile_seconds: float, losses: list[float], tokens: int, speed: float
) -> dict[str, Any]:
    first, *others = times
    return {
        "tokens_per_second": tokens / statistics.median(others),
        "seconds": spread(others),
        "first_step_seconds": compile_seconds + first,
        "first_loss": losses[0],
        "loss": losses[-1],
        _PRODUCT: speed,
    }


if __name__ == "__main__":
    main()
