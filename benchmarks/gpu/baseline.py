"""Ours beside transformers on torch: outputs agree first, then ours, theirs, ours, each in its own process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.common import RESULT, report

# What theirs does, on which shape, and our case.
CASES = {
    "llama_1b_decode": ("decode", "1b", "decode/1b_b1"),
    "llama_1b_train": ("train", "1b", "train/llama_1b"),
    "t5_large_train": ("train", "t5_large", "train/t5_large"),
    "llama_8b_decode": ("decode", "8b", "decode/8b_b1"),
    "t5_large_decode": ("decode", "t5_large", "decode/t5_large_b1"),
}
# Float32 logits of both sides, relative to the largest; a GPU's own products are less exact than a CPU's.
_AGREE = 2e-3


def main(case: str, *, toy: bool) -> None:
    """Measures and reports one case."""
    what, shape, ours = CASES[case]
    flags = ["--toy"] if toy else []
    with tempfile.TemporaryDirectory() as folder:
        _process("benchmarks.gpu.torch_side", "export", shape, folder, *flags)
        difference = _process("benchmarks.gpu.baseline", folder)["difference"]
    if not difference < _AGREE:
        raise SystemExit(f"{case}: the logits differ by {difference:.1e}; the speed of a wrong model says nothing")
    one = ["--one", ours, *(["--dry-run"] if toy else [])]
    first, theirs, again = (
        _process("benchmarks.gpu.run", *one),
        _process("benchmarks.gpu.torch_side", what, shape, "-", *flags),
        _process("benchmarks.gpu.run", *one),
    )
    rates = [_rate(first), _rate(again)]
    report(
        "baseline",
        case,
        ours=rates,
        theirs=theirs["rate"],
        ratio=sum(rates) / 2 / theirs["rate"],
        logits_difference=difference,
        their_rows=theirs.get("rows", 1),
        versions={name: theirs[name] for name in ("torch", "transformers")},
    )


def _rate(result: dict[str, Any]) -> float:
    return result["sequences_per_second" if "sequences_per_second" in result else "tokens_per_second"]


def _process(module: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command[2:])} ended with {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1].removeprefix(RESULT))


def agree(folder: Path) -> float:
    """Largest difference of our logits from those that `torch_side export` left, relative to the largest logit."""
    import jax

    from jaxllm import load_hf

    model, params = load_hf(str(folder))
    names = [name for name in ("input_ids", "decoder_input_ids") if (folder / f"{name}.npy").exists()]
    tokens, theirs = [np.load(folder / f"{name}.npy") for name in names], np.load(folder / "logits.npy")
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(lambda p, *t: model.apply({"params": p}, *t))(params, *tokens)
    return float(np.abs(np.asarray(logits) - theirs).max() / np.abs(theirs).max())


if __name__ == "__main__":
    print(json.dumps({"difference": agree(Path(sys.argv[1]))}))
