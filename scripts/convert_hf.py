"""Converts weights: python scripts/convert_hf.py SOURCE TARGET [--dtype bfloat16].

A run folder or Meta's original layout becomes a Hugging Face directory (with the run's tokenizer); a Hugging Face
directory becomes a run folder that holds parameters only, for training.init_from and scripts/generate.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jaxllm.interop.hf import save_hf
from jaxllm.interop.meta import load_meta
from jaxllm.training.export import export_run, import_run


def main() -> int:
    """Parses the command line and converts by what the source is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="run folder, Hugging Face directory, or folder with params.json")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default as in the source (runs: float32)")
    parser.add_argument("--max-length", type=int, help="context length, which Meta's params.json does not say")
    arguments = parser.parse_args()
    source, target = arguments.source, arguments.target
    try:
        if (source / "config.yaml").is_file():
            export_run(source, target, dtype=arguments.dtype)
        elif (source / "params.json").is_file():
            save_hf(target, *load_meta(source, max_length=arguments.max_length, dtype=arguments.dtype))
        else:
            import_run(source, target)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
