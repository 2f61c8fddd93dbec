"""Loading a Hugging Face directory against transformers' from_pretrained: seconds and peak memory.

    python -m benchmarks.load_hf --shape 1B        needs the extras `parity`, 3 GB of disk and twice that of memory

A random bfloat16 checkpoint is written to a temporary folder and read from the page cache. Each side runs in its own
process, alternating (ours, transformers, ours, transformers); imports and the backend's start are not timed. Our
arrays belong to the process, transposed and stacked. Where no dtype changes, transformers maps the file: `seconds`
includes reading every page, and `seconds_own` copies every parameter out of the mapping, as training does at its first
update. Samples of the weights are compared. Results go to benchmarks/results/load_hf_*.json.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import shapes
from benchmarks.report import spread
from benchmarks.sides import environment, run_side, save

SHAPES = {"1B": shapes.SHAPES["1b"], "toy": shapes.SHAPES["toy"]}
PAGE = 4096


def main() -> None:
    """Writes the checkpoint, alternates the two sides, and writes the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="1B")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="loaded as")
    parser.add_argument("--turns", type=int, default=2, help="pairs of turns")
    parser.add_argument("--side", choices=list(SIDES), help="run one side in this process")
    parser.add_argument("--work", type=Path, help="folder that the processes share")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(SIDES[arguments.side](arguments.shape, arguments.dtype, arguments.work)))
        return
    with tempfile.TemporaryDirectory() as work:
        written = run_side("write", work)
        pair = ("jaxllm", "transformers")
        turns = [{side: run_side(side, work) for side in pair} for _ in range(arguments.turns)]
        compare(Path(work))
    result = {
        "benchmark": "load_hf",
        "shape": arguments.shape,
        "dtype": arguments.dtype,
        "file_bytes": written["bytes"],
        "ours_over_theirs": {
            key: spread([turn["jaxllm"][key] / turn["transformers"][key] for turn in turns])
            for key in ("seconds", "seconds_own", "peak_bytes", "added_bytes")
        },
        "turns": turns,
        **environment(),
    }
    path = save(f"load_hf_{arguments.shape}_{arguments.dtype}", result)
    medians = {key: round(spread["median"], 3) for key, spread in result["ours_over_theirs"].items()}
    print(f"{path.name}: ours / theirs {medians}")


def write(shape: str, _: str, work: Path) -> dict[str, Any]:
    """The checkpoint: bfloat16 normal numbers, a million of them repeated."""
    import jax
    import jax.numpy as jnp

    from jaxllm import save_hf
    from jaxllm.models import abstract_params, build

    model = build(SHAPES[shape])
    numbers = (0.02 * np.random.default_rng(0).standard_normal(1_000_003)).astype(jnp.bfloat16)  # of no layer's period
    params = jax.tree.map(lambda leaf: np.resize(numbers, leaf.shape), abstract_params(model))
    save_hf(work / "hf", model, params)
    return {"bytes": sum(path.stat().st_size for path in (work / "hf").glob("*.safetensors"))}


def run_jaxllm(_: str, dtype: str, work: Path) -> dict[str, Any]:
    """Times load_hf."""
    import jax

    from jaxllm import load_hf

    jax.devices()
    measure = _Measure()
    params = jax.block_until_ready(load_hf(work / "hf", dtype=dtype)[1])
    result = measure.result()
    result["seconds_own"] = result["seconds"]
    kernel = np.asarray(params["layers"]["down_proj"]["kernel"][-1], np.float32)
    np.savez(work / "jaxllm.npz", embed=np.asarray(params["embed"][-1], np.float32), last=kernel.T)
    return result


def run_transformers(shape: str, dtype: str, work: Path) -> dict[str, Any]:
    """Times from_pretrained and a look at every page."""
    import torch
    from transformers import LlamaForCausalLM

    torch.zeros(1).add_(1)
    measure = _Measure()
    model = LlamaForCausalLM.from_pretrained(work / "hf", dtype=getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.flatten()[:: PAGE // parameter.element_size()].sum()
    result = measure.result()
    result["seconds_own"] = result["seconds"]
    if dtype == "bfloat16":  # as the file: mapped
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data = parameter.clone()
        result["seconds_own"] = measure.result()["seconds"]
    found = model.state_dict()
    last = f"model.layers.{SHAPES[shape].num_layers - 1}.mlp.down_proj.weight"
    samples = {"embed": found["model.embed_tokens.weight"][-1], "last": found[last]}
    np.savez(work / "transformers.npz", **{name: tensor.float().numpy() for name, tensor in samples.items()})
    return result


def compare(work: Path) -> None:
    """Stops unless both sides read the same numbers."""
    ours, theirs = np.load(work / "jaxllm.npz"), np.load(work / "transformers.npz")
    for name in ("embed", "last"):
        if not np.array_equal(ours[name], theirs[name]):
            raise SystemExit(f"the two sides read different values of {name}: the speed of wrong weights means nothing")


class _Measure:
    """Seconds since it was made, and the process's peak memory in all and beyond what it had been."""

    def __init__(self) -> None:
        self._peak = _peak_bytes()
        self._start = time.perf_counter()

    def result(self) -> dict[str, float]:
        seconds, peak = time.perf_counter() - self._start, _peak_bytes()
        return {"seconds": seconds, "peak_bytes": peak, "added_bytes": peak - self._peak}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kibibytes on Linux


SIDES = {"write": write, "jaxllm": run_jaxllm, "transformers": run_transformers}

if __name__ == "__main__":
    main()
