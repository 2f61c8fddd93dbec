"""Continues text with a trained model: python scripts/generate.py RUN_OR_HF_FOLDER "def read_" [options].

A T5 fills blanks: python scripts/generate.py FOLDER "The <extra_id_0> sat on the <extra_id_1>."
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Marks = list[tuple[int, float]]  # tokens of each chunk or batch, and seconds since the start when it was there


def main() -> int:
    """Reads one prompt, or a file of them, and writes what the model says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="run folder (config.yaml) or Hugging Face directory (config.json)")
    parser.add_argument("prompt", nargs="?", help="text; - reads standard input, without its last line break")
    parser.add_argument("--prompt-file", type=Path, help="file that holds the prompt, its last line break left out")
    parser.add_argument("--batch", type=Path, help="file with a prompt per line; results as JSON lines on stdout")
    parser.add_argument("--batch-size", type=int, default=32, help="prompts of --batch at a time; changes no result")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--stop", action="append", default=[], help="string that ends the output; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--int8", action="store_true", help="store the weights as int8")
    arguments = parser.parse_args()
    if sum(x is not None for x in (arguments.prompt, arguments.prompt_file, arguments.batch)) != 1:
        parser.error("give exactly one of: a prompt (- for standard input), --prompt-file, --batch")
    if arguments.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {arguments.batch_size}")
    try:
        _speak(arguments)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _speak(arguments: argparse.Namespace) -> None:
    from jaxllm.ops.sampling import Sampling
    from jaxllm.training.speaker import load_speaker

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    sampling = Sampling(**{name: getattr(arguments, name) for name in names})
    prompts = _prompts(arguments)
    speaker = load_speaker(arguments.folder, dtype=arguments.dtype, int8=arguments.int8)
    options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "sampling": sampling}
    options |= {"eos_ids": speaker.eos_ids, "pad_id": speaker.pad_id, "stop": arguments.stop, "decode": speaker.decode}
    write = _write_batches if arguments.batch else _write_stream
    counts, times = zip(*write(speaker, prompts, arguments, options), strict=True)
    text = f"{sum(counts)} tokens in {times[-1]:.2f} s"
    if len(counts) > 1 and not arguments.batch:
        rate = sum(counts[1:]) / (times[-1] - times[0])
        text += f": the first {counts[0]} with compilation in {times[0]:.2f} s, then {rate:.1f} tokens/s"
    else:
        text += f", compilation included: {sum(counts) / times[-1]:.1f} tokens/s"
    print(text, file=sys.stderr)


def _write_batches(speaker: Any, prompts: list[str], arguments: argparse.Namespace, options: Any) -> Marks:
    """JSON lines on stdout; each prompt has a seed of its own, so that the size of a batch changes no result."""
    from jaxllm.generation import generate

    marks, begun = [], time.perf_counter()
    for start in range(0, len(prompts), arguments.batch_size):
        part = prompts[start : start + arguments.batch_size]
        seeds = [arguments.seed + start + i for i in range(len(part))]
        rows = generate(speaker.model, speaker.params, [speaker.encode(text) for text in part], seed=seeds, **options)
        for prompt, row in zip(part, rows, strict=True):
            print(json.dumps({"prompt": prompt, "text": speaker.decode(row), "tokens": len(row)}, ensure_ascii=False))
        sys.stdout.flush()
        marks.append((sum(map(len, rows)), time.perf_counter() - begun))
    return marks


def _write_stream(speaker: Any, prompts: list[str], arguments: argparse.Namespace, options: Any) -> Marks:
    """Text on stdout as it comes."""
    from jaxllm.generation import generate_stream

    marks, begun = [], time.perf_counter()

    def counted() -> Iterator[list[list[int]]]:
        ids = speaker.encode(prompts[0])
        for chunk in generate_stream(speaker.model, speaker.params, [ids], seed=arguments.seed, **options):
            marks.append((len(chunk[0]), time.perf_counter() - begun))
            yield chunk

    for piece in speaker.pieces(counted()):
        print(piece, end="", flush=True)
    print()
    return marks


def _prompts(arguments: argparse.Namespace) -> list[str]:
    if arguments.batch:
        prompts = arguments.batch.read_text(encoding="utf-8").splitlines()
        if not prompts:
            raise ValueError(f"{arguments.batch} is empty; write one prompt per line")
        return prompts
    if arguments.prompt_file:
        return [arguments.prompt_file.read_text(encoding="utf-8").removesuffix("\n")]
    return [sys.stdin.read().removesuffix("\n") if arguments.prompt == "-" else arguments.prompt]


if __name__ == "__main__":
    sys.exit(main())
