"""Continues text with a trained model: jaxllm generate RUN_OR_HF_FOLDER "def read_" [options].

A T5 fills blanks: jaxllm generate FOLDER "The <extra_id_0> sat on the <extra_id_1>."
"""

import argparse
import os
import platform
import sys
from pathlib import Path

from huge_pages import restart_with_huge_pages
from interrupts import failed, interruptible

# By host name: programs that XLA compiled for a CPU belong to its kind, and a home folder to several machines.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "jaxllm" / platform.node()


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


@interruptible
def main() -> int:
    """Reads one prompt, or a file of them, and writes the generated text."""
    from display.text import add_options

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Help)
    parser.add_argument("folder", help="run folder (config.yaml) or Hugging Face directory (config.json)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("prompt", nargs="?", help="text; - reads standard input, without its last line break")
    source.add_argument("--prompt-file", type=Path, help="file that holds the prompt, its last line break left out")
    source.add_argument("--batch", type=Path, help="file with a prompt per line; results as JSON lines on stdout")
    add_options(parser)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the model")
    parser.add_argument("--int8", action="store_true", help="store the weights as int8")
    parser.add_argument("--cache", default=CACHE, help="folder of compiled programs, for later calls")
    try:
        _generate(parser.parse_args())
    except (ValueError, RuntimeError, OSError) as error:
        return failed(error, 1)
    return 0


def _generate(arguments: argparse.Namespace) -> None:
    from display import text
    from jaxllm.host.device import compilation_cache
    from jaxllm.run.load import load_text_model

    options = text.options_of(arguments)
    prompts = text.read_prompts(arguments.prompt, prompt_file=arguments.prompt_file, batch=arguments.batch)
    with compilation_cache(arguments.cache):
        text_model = load_text_model(arguments.folder, dtype=arguments.dtype, int8=arguments.int8)
        text.write(text_model, prompts, stream=not arguments.batch, **options)


if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
