"""Continues text with a trained model: python scripts/generate.py RUN_OR_HF_FOLDER "def read_" [options].

A T5 fills blanks: python scripts/generate.py FOLDER "The <extra_id_0> sat on the <extra_id_1>."
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from huge_pages import restart_with_huge_pages


def main() -> int:
    """Reads one prompt, or a file of them, and writes the generated text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="run folder (config.yaml) or Hugging Face directory (config.json)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("prompt", nargs="?", help="text; - reads standard input, without its last line break")
    source.add_argument("--prompt-file", type=Path, help="file that holds the prompt, its last line break left out")
    source.add_argument("--batch", type=Path, help="file with a prompt per line; results as JSON lines on stdout")
    parser.add_argument("--batch-size", type=int, default=32, help="prompts of --batch at a time; changes no result")
    numbers = {"max-new-tokens": 128, "top-p": 1.0, "min-p": 0.0, "repetition-penalty": 1.0, "seed": 0}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"default {default}")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--stop", action="append", default=[], help="text to end after; may be repeated")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--int8", action="store_true", help="store the weights as int8")
    arguments = parser.parse_args()
    if arguments.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {arguments.batch_size}")
    try:
        _generate(arguments)
    except KeyboardInterrupt:
        return 130  # as a shell reports it
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _generate(arguments: argparse.Namespace) -> None:
    from jaxllm.generation import terminal
    from jaxllm.ops.sampling import Sampling
    from jaxllm.run.load import load_text_model

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    sampling = Sampling(**{name: getattr(arguments, name) for name in names})
    prompts = terminal.read_prompts(arguments.prompt, prompt_file=arguments.prompt_file, batch=arguments.batch)
    text_model = load_text_model(arguments.folder, dtype=arguments.dtype, int8=arguments.int8)
    options = {name: getattr(arguments, name) for name in ("max_new_tokens", "stop", "seed", "batch_size")}
    terminal.write(text_model, prompts, stream=not arguments.batch, sampling=sampling, **options)


if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
