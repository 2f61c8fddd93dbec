"""One measurement of transformers on torch, in a process of its own: python -m benchmarks.gpu.torch_side WHAT JSON.

`export` leaves a shallow model of a shape's width, tokens and its logits, for the other side to agree with; `train`
and `decode` time one form of the baseline. The JSON object holds the arguments of the function. The last line is a
result, or an error: no exception leaves this process, so that the caller can record what went wrong.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._inductor.config as inductor

from benchmarks import torch_models
from benchmarks.gpu.common import report, shape, spread
from jaxllm.config import T5Config

_CHUNK = 4096  # positions of a chunked loss, as on our side
_VOCABULARY = 8192  # agreement depends on the width of a model, not on how many tokens it knows


def export(*, shape_name: str, toy: bool, folder: str) -> dict[str, Any]:
    """Saves a shallow float32 model, tokens and logits."""
    config = shape(shape_name, toy=toy)
    config = dataclasses.replace(config, num_layers=2, vocab_size=min(config.vocab_size, _VOCABULARY))
    if isinstance(config, T5Config):
        config = dataclasses.replace(config, num_decoder_layers=2)
    model = torch_models.model_of(config).eval()
    inputs = torch_models.inputs_of(_tokens(config, (2, 64), (2, 32)))
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    model.save_pretrained(folder)
    for name, array in {"logits": logits, **inputs}.items():
        np.save(Path(folder) / f"{name}.npy", array.cpu().numpy())
    return {}


def _tokens(config: Any, encoder: tuple[int, int], decoder: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [encoder, decoder] if isinstance(config, T5Config) else [encoder]
    return [rng.integers(1, config.vocab_size, each) for each in shapes]


def train(
    *, shape_name: str, toy: bool, length: int, targets: int, rows: int, loss: str, attention: str, mode: str
) -> dict[str, Any]:
    """Tokens (of T5: rows) per second of a train step in bfloat16."""
    config = shape(shape_name, toy=toy)
    model = torch_models.model_of(config, attention=attention).train()
    inputs = torch_models.inputs_of(_tokens(config, (rows, length), (rows, targets)))
    wanted = torch.randint(1, config.vocab_size, (rows, targets or length), device=torch_models.DEVICE)
    chunk = {"whole": None, "chunked": 8 if toy else _CHUNK}[loss]
    step = torch_models.train_step(model, autocast=True, mode=mode, chunk=chunk)
    losses: list[torch.Tensor] = []

    def run() -> None:
        losses.append(step(inputs, wanted))

    times = spread(torch_models.timed(run, warm=1 if toy else 3, count=1 if toy else 4, size=1 if toy else 3))
    kernels = torch_models.attention_kernels(run)
    if not float(losses[-1]) < float(losses[0]):  # one batch, again and again
        raise ArithmeticError(f"the loss went from {float(losses[0])} to {float(losses[-1])}")
    rate = (rows if targets else rows * length) / times["median"]
    return {"seconds": times, "rate": rate, "attention_kernels": kernels, **_facts()}


def decode(*, shape_name: str, toy: bool, prompt: int, new: int, mode: str) -> dict[str, Any]:
    """Greedy tokens per second at batch 1: the difference of two lengths leaves the prompt out."""
    config = shape(shape_name, toy=toy)
    model = torch_models.model_of(config, dtype=torch.float32 if toy else torch.bfloat16).eval()
    tokens = torch_models.inputs_of(_tokens(config, (1, prompt), (1, 1)))["input_ids"]
    ran = {"ran": "static cache, compiled"}
    if mode != "generate":
        inductor.coordinate_descent_tuning = mode == "loop_tuned"
        return _per_token(torch_models.greedy_loop(model, tokens, longest=new), new, toy=toy) | ran
    try:
        return _per_token(torch_models.generator(model, tokens, static=True), new, toy=toy) | ran
    except Exception as error:
        ran = {"ran": f"growing cache, eager; compiled it failed: {_text(error)}"}
    return _per_token(torch_models.generator(model, tokens, static=False), new, toy=toy) | ran


def _per_token(run: Callable[[int], torch.Tensor], new: int, *, toy: bool) -> dict[str, Any]:
    short = max(new // 8, 1)
    if (made := run(new).shape[1]) != new:  # the longest first: its cache serves the shorter too
        raise ArithmeticError(f"{made} tokens instead of {new}")
    counts = {"warm": 0 if toy else 1, "count": 1 if toy else 3}
    long, brief = (torch_models.timed(functools.partial(run, each), **counts) for each in (new, short))
    if toy:  # a few tokens of a toy differ by less than the noise
        brief = [0.0] * len(long)
    seconds = spread([(a - b) / (new - short) for a, b in zip(sorted(long), sorted(brief), strict=True)])
    if seconds["median"] <= 0:
        raise ArithmeticError(f"{new} tokens took no longer than {short}: too noisy to say anything")
    kernels = torch_models.attention_kernels(functools.partial(run, min(new, 4)))
    return {"seconds": seconds, "rate": 1 / seconds["median"], "attention_kernels": kernels, **_facts()}


def _facts() -> dict[str, Any]:
    """What a compiled run needed: graphs (one is all of it), and the most memory."""
    from torch._dynamo.utils import counters

    facts: dict[str, Any] = {"graphs": counters["stats"]["unique_graphs"]}
    if torch_models.DEVICE == "cuda":
        facts["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return facts


def _text(error: Exception) -> str:
    """The exception in one line; out of memory in these words, whatever it is wrapped in."""
    text = f"{type(error).__name__}: {error}"
    return "out of memory" if "out of memory" in text.lower() else " ".join(text.split())[:400]


def main(what: str, arguments: dict[str, Any]) -> None:
    """Does one thing and prints its result."""
    torch.manual_seed(0)
    try:
        result = {"export": export, "train": train, "decode": decode}[what](**arguments)
    except Exception as error:
        result = {"error": _text(error)}
        traceback.print_exc()
    report("torch", what, **result, versions=torch_models.VERSIONS)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
