"""Greedy decoding against transformers: same shapes, same random weights, outputs compared first.

    python -m benchmarks.decode --shape A --batch 1          needs the extras `parity`

The sides are ours, `generate` of transformers with its growing cache (eager) and with its static cache (compiled), and
a loop around a compiled token step (`torch_models.greedy_loop`). Each runs in its own process, in turns, because a
machine's speed drifts; ratios are taken within a turn. A time covers a whole generation with its prompt, after one that
warms up. The roofline is the bytes that a step must read (weights, and the cache up to the present length) over the
read bandwidth measured in the same process. Results go to benchmarks/results/decode_*.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shapes import SHAPES
from benchmarks.sides import environment, ratios, run_side, save, shown

SIDES = ("jaxllm", "torch_dynamic", "torch_static", "torch_loop")


def main() -> None:
    """Alternates the sides, checks that they give the same tokens, and writes the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="A")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=3, help="timed generations of a side in a turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--int8", action="store_true", help="our weights in int8; outputs then differ a little")
    parser.add_argument("--side", choices=[*SIDES, "weights"], help="run one side in this process")
    parser.add_argument("--work", type=Path, help="folder the sides share")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(_side(arguments)))
        return
    with tempfile.TemporaryDirectory() as work:
        run_side("weights", work)
        turns = [{side: run_side(side, work) for side in SIDES} for _ in range(arguments.turns)]
        agreement = _agreement(Path(work), exact=arguments.dtype == "float32" and not arguments.int8)
    result = {
        "benchmark": "decode",
        **{name: getattr(arguments, name) for name in ("shape", "batch", "prompt", "new", "dtype", "int8")},
        "ratio": ratios(turns, SIDES[1:]),
        "equal_tokens": agreement,
        "turns": turns,
        **environment(),
    }
    kind = f"{arguments.shape}_b{arguments.batch}_{arguments.dtype}{'_int8' if arguments.int8 else ''}"
    path = save(f"decode_{kind}", result)
    ours = [turn["jaxllm"] for turn in turns]
    print(
        f"{path.name}: {shown(result['ratio'])}; "
        f"{statistics.median(x['roofline_fraction'] for x in ours):.0%} of the measured read bandwidth, "
        f"{statistics.median(x['tokens_per_second'] for x in ours):.0f} tokens/s"
    )


def _side(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.side == "weights":
        return _write_weights(arguments)
    return run_jaxllm(arguments) if arguments.side == "jaxllm" else run_torch(arguments)


def _agreement(work: Path, *, exact: bool) -> float:
    """The fraction of new tokens that are the same on all sides."""
    ours, *theirs = (np.load(work / f"{side}.npy") for side in SIDES)
    shares = [float(np.mean(ours == other)) for other in theirs]
    if exact and min(shares) < 1:
        raise SystemExit(f"only {min(shares):.1%} of the tokens agree: the speed of a wrong model means nothing")
    return min(shares)


def _prompts(arguments: argparse.Namespace) -> np.ndarray:
    # Ids from 2 on: 0 and 1 are padding and end in T5.
    shape, vocab = (arguments.batch, arguments.prompt), SHAPES[arguments.shape].vocab_size
    return np.random.default_rng(0).integers(2, vocab, shape).astype(np.int32)


def _write_weights(arguments: argparse.Namespace) -> dict[str, Any]:
    import jax

    from jaxllm.interop.hf import save_hf
    from jaxllm.models import build, init_params

    model = build(SHAPES[arguments.shape], dtype=np.dtype(np.float32))
    save_hf(arguments.work / "model", model, init_params(model, jax.random.key(0)))
    return {}


def run_jaxllm(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times `generate` and measures what it needs."""
    import jax

    from jaxllm.generation import generate
    from jaxllm.interop.hf import load_hf
    from jaxllm.models import decoder_of

    model, params = load_hf(arguments.work / "model", dtype=arguments.dtype)
    prepared = jax.block_until_ready(decoder_of(model).prepare(params, int8=arguments.int8))
    del params
    prompts = _prompts(arguments).tolist()
    rows, times = [], []
    for _ in range(arguments.repeats + 1):
        before = time.perf_counter()
        rows = generate(model, prepared, prompts, max_new_tokens=arguments.new)
        times.append(time.perf_counter() - before)
    np.save(arguments.work / "jaxllm.npy", np.array(rows))
    result = _result(times, arguments)
    bandwidth = _bandwidth()
    needs = _needs(model, prepared, prompts, arguments)
    steps_per_second = result["tokens_per_second"] / arguments.batch
    return result | {
        "bandwidth_bytes_per_second": bandwidth,
        "roofline_tokens_per_second": arguments.batch * bandwidth / needs["bytes_per_step"],
        "roofline_fraction": needs["bytes_per_step"] * steps_per_second / bandwidth,
        **needs,
    }


def _bandwidth() -> float:
    """Bytes per second of the best of ten passes over a matrix that fits no cache: its sum, or a vector times it."""
    import jax
    import jax.numpy as jnp

    matrix = jnp.ones((2**16, 1024), jnp.float32)
    readers = (jax.jit(lambda x: jnp.sum(x, axis=1)), jax.jit(lambda x: jnp.ones((1, x.shape[0])) @ x))
    times = []
    for reader in readers:
        reader(matrix).block_until_ready()
        for _ in range(10):
            before = time.perf_counter()
            reader(matrix).block_until_ready()
            times.append(time.perf_counter() - before)
    return matrix.nbytes / min(times)


def _needs(model: Any, params: Any, prompts: list[list[int]], arguments: argparse.Namespace) -> dict[str, float]:
    """Bytes of parameters and cache, those that a step reads of them, and what a chunk of steps needs above them."""
    import jax

    from benchmarks.gpu.decode import mean_filled, step_bytes
    from jaxllm.generation import loop
    from jaxllm.generation.requests import make_request
    from jaxllm.training.fit import tree_bytes

    r = make_request(model, params, prompts, max_new_tokens=arguments.new)
    context, state = loop.begin(r.decoder, r.settings, r.params, r.tokens, r.lengths, r.keys)
    stopped, attended = np.zeros(arguments.batch, bool), r.settings.plan.slots
    lowered = loop.next_chunk.lower(r.decoder, r.settings, r.params, context, state, stopped, attended)
    memory: Any = lowered.compile().memory_analysis()
    filled = mean_filled(model.config, arguments.prompt, arguments.new)
    return {
        "bytes_per_step": step_bytes(r, context, jax.block_until_ready(state), filled=filled),
        "parameter_bytes": tree_bytes(params),
        "cache_bytes": tree_bytes((context, state.cache)),
        "bytes_above_parameters_and_cache": memory.temp_size_in_bytes,
    }


def run_torch(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times transformers on the same weights."""
    import torch

    from benchmarks import torch_models

    model = torch_models.model_of(arguments.work / "model", dtype=getattr(torch, arguments.dtype)).eval()
    tokens, new = torch_models.inputs_of([_prompts(arguments)])["input_ids"], arguments.new
    if arguments.side == "torch_loop":
        run = torch_models.greedy_loop(model, tokens, longest=new)
    else:
        run = torch_models.generator(model, tokens, static=arguments.side == "torch_static")
    rows: list[torch.Tensor] = []
    times = torch_models.timed(lambda: rows.append(run(new).cpu()), warm=0, count=arguments.repeats + 1)
    np.save(arguments.work / f"{arguments.side}.npy", rows[-1].numpy())
    return _result(times, arguments)


def _result(times: list[float], arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "tokens_per_second": arguments.batch * arguments.new / statistics.median(times[1:]),
        "seconds": times[1:],
        "first_seconds": times[0],
    }


if __name__ == "__main__":
    main()
