"""One measurement of transformers on torch, in its own process: python -m benchmarks.gpu.torch_side WHAT JSON.

`export` leaves a shallow model of a shape's width, tokens and its logits, for the other side to agree with; `train`
and `decode` time one form of the baseline. The JSON object holds the arguments of the function. Each function yields
what it has measured so far, and the last line printed is the most complete: a profiler that fails or hangs does not
lose the rate. Exceptions become results as well, so that the caller records what went wrong.
"""

import dataclasses
import functools
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._inductor.config as inductor

from benchmarks import torch_models
from benchmarks.report import report, spread
from benchmarks.shapes import shape

_CHUNK = 4096  # positions of a chunked loss, as on our side
_VOCABULARY = 8192  # enough for the agreement: 128,256 tokens would only make the files larger


def export(*, shape_name: str, toy: bool, folder: str) -> Iterator[dict[str, Any]]:
    """Saves a shallow float32 model, tokens and logits."""
    config = shape(shape_name, toy=toy)
    config = dataclasses.replace(config, num_layers=2, vocab_size=min(config.vocab_size, _VOCABULARY))
    if config.encoder_decoder:
        config = dataclasses.replace(config, num_decoder_layers=2)
    model = torch_models.model_of(config).eval()
    inputs = torch_models.inputs_of(_tokens(config, (2, 64), (2, 32)))
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    model.save_pretrained(folder)
    for name, array in {"logits": logits, **inputs}.items():
        np.save(Path(folder) / f"{name}.npy", array.cpu().numpy())
    yield {}


def _tokens(config: Any, encoder: tuple[int, int], decoder: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [encoder, decoder] if config.encoder_decoder else [encoder]
    return [rng.integers(1, config.vocab_size, each) for each in shapes]


def train(
    *, shape_name: str, toy: bool, length: int, targets: int, rows: int, loss: str, attention: str, mode: str
) -> Iterator[dict[str, Any]]:
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
    first, last = float(losses[0]), float(losses[-1])
    if not np.isfinite(last):
        raise ArithmeticError(f"the loss went from {first} to {last}")
    rate = (rows if targets else rows * length) / times["median"]
    yield {"seconds": times, "rate": rate, "first_loss": first, "last_loss": last, **_facts()}
    yield {"attention_kernels": torch_models.attention_kernels(run)}


def decode(*, shape_name: str, toy: bool, prompt: int, new: int, mode: str) -> Iterator[dict[str, Any]]:
    """Greedy tokens per second at batch 1."""
    config = shape(shape_name, toy=toy)
    model = torch_models.model_of(config, dtype=torch.float32 if toy else torch.bfloat16).eval()
    tokens = torch_models.inputs_of(_tokens(config, (1, prompt), (1, 1)))["input_ids"]
    inductor.coordinate_descent_tuning = mode == "loop_tuned"
    run = torch_models.generator(model, tokens, static=True)
    if mode != "generate":
        run = torch_models.greedy_loop(model, tokens, longest=new)
    yield {"ran": "static cache, compiled"}
    try:
        times = _per_token(run, new, toy=toy)
    except Exception as error:
        if mode != "generate":
            raise
        yield {"ran": f"growing cache, eager; compiled it failed: {_text(error)}"}
        run = torch_models.generator(model, tokens, static=False)
        times = _per_token(run, new, toy=toy)
    yield {"seconds": times, "rate": 1 / times["median"], **_facts()}
    yield {"attention_kernels": torch_models.attention_kernels(functools.partial(run, min(new, 4)))}


def _per_token(run: Callable[[int], torch.Tensor], new: int, *, toy: bool) -> dict[str, float]:
    """Seconds of a token: the difference of two lengths leaves the prompt out."""
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
    return seconds


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
    """Does one thing and prints its results."""
    torch.manual_seed(0)
    result: dict[str, Any] = {"versions": torch_models.VERSIONS}
    try:
        for more in {"export": export, "train": train, "decode": decode}[what](**arguments):
            result |= more
            report("torch", what, **result)
    except Exception as error:
        traceback.print_exc()
        report("torch", what, **result, error=_text(error))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
