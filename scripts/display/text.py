"""Reads options and prompts; writes generated text to standard output, as it comes or as JSON lines, and the speed.

Out of scope: other arguments (`scripts/generate.py`), loading (`jaxllm.run.load`).
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from jaxllm.config.setting import settings_of
from jaxllm.generation.requests import check_prompts
from jaxllm.generation.text import TextModel
from jaxllm.ops.sampling import Sampling


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of a generation, those of `Sampling` among them."""
    parser.add_argument("--batch-size", type=int, default=32, help="prompts of --batch at a time; changes no result")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="most tokens to add")
    parser.add_argument("--seed", type=int, default=0, help="of the random choices")
    parser.add_argument("--stop", action="append", default=[], help="text to end after; may be repeated")
    for name, setting in settings_of(Sampling).items():
        kind = int if int in (setting.kind, *get_args(setting.kind)) else float
        default = 0.7 if name == "temperature" else setting.default
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=setting.meaning)


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that `add_options` declares, for `write`; ValueError as `Sampling`."""
    sampling = Sampling(**{name: getattr(arguments, name) for name in settings_of(Sampling)})
    names = ("batch_size", "max_new_tokens", "seed", "stop")
    return {"sampling": sampling} | {name: getattr(arguments, name) for name in names}


def read_prompts(prompt: str | None, *, prompt_file: Path | None, batch: Path | None) -> list[str]:
    """The prompt (- is standard input), that of a file, or one a line of `batch`; ValueError where it has no text."""
    if batch:
        text = _read(batch)
        if not text:
            raise ValueError(f"{batch} is empty; write one prompt per line")
        return text.split("\n")  # splitlines would also cut at form feeds and U+2028
    if prompt_file:
        return [_read(prompt_file)]
    return [sys.stdin.read().removesuffix("\n") if prompt in (None, "-") else prompt]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def write(text_model: TextModel, prompts: list[str], *, stream: bool, batch_size: int, **options: Any) -> None:
    """`write_stream` of the first prompt, or `write_batches` of all of them; the speed goes to standard error."""
    if stream:
        rate = write_stream(text_model, prompts[0], **options)
    else:
        rate = write_batches(text_model, prompts, batch_size=batch_size, **options)
    print(rate, file=sys.stderr)


def write_stream(text_model: TextModel, prompt: str, *, seed: int, **options: Any) -> str:
    """Writes the text of a prompt piece by piece; returns a line about the speed.

    Options are those of `TextModel.generate_stream`.
    """
    counts, times, begun = [], [], time.perf_counter()

    def counted() -> Iterator[list[list[int]]]:
        for chunk in text_model.generate_stream([text_model.encode(prompt)], seed=seed, **options):
            counts.append(len(chunk[0]))
            times.append(time.perf_counter() - begun)
            yield chunk

    for piece in text_model.pieces(counted()):
        print(piece, end="", flush=True)
    print()
    if len(counts) < 2:
        return _with_compilation(sum(counts), times[-1])
    rate = sum(counts[1:]) / (times[-1] - times[0])
    text = f"{sum(counts)} tokens in {times[-1]:.2f} s: the first {counts[0]} with compilation in {times[0]:.2f} s"
    return f"{text}, then {rate:.1f} tokens/s"


def write_batches(text_model: TextModel, prompts: list[str], *, batch_size: int, seed: int, **options: Any) -> str:
    """Writes a JSON line per prompt; returns a line about the speed. Options as `TextModel.generate`.

    The seed of each prompt is `seed` plus its number, so that `batch_size` changes no result. All prompts are checked
    before the first is answered.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    total, begun = 0, time.perf_counter()
    encoded = [text_model.encode(text) for text in prompts]
    check_prompts(text_model.model, encoded, new=options["max_new_tokens"])
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        seeds = list(range(seed, seed + len(prompts)))[part]
        rows = text_model.generate(encoded[part], seed=seeds, **options)
        for prompt, row in zip(prompts[part], rows, strict=True):
            line = {"prompt": prompt, "text": text_model.decode(row), "tokens": len(row)}
            print(json.dumps(line, ensure_ascii=False))
        sys.stdout.flush()
        total += sum(map(len, rows))
    return _with_compilation(total, time.perf_counter() - begun)


def _with_compilation(tokens: int, seconds: float) -> str:
    return f"{tokens} tokens in {seconds:.2f} s, compilation included: {tokens / seconds:.1f} tokens/s"
