"""Converts weights: jaxllm convert SOURCE TARGET [--dtype bfloat16].

RUN or RUN@STEP becomes a Hugging Face directory (with the run's tokenizer); a Hugging Face directory becomes a run
folder that holds parameters only, for training.init_from and `jaxllm generate`.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from display.convert import export_run, import_run
from interrupts import failed, interruptible
from jaxllm.storage.folder import Kind, find_model


@interruptible
def main() -> int:
    """Parses the command line and converts by what the source is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="RUN, RUN@STEP or Hugging Face directory")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--dtype", help="of a directory's tensors: float32, bfloat16 or float16; default: the source's")
    arguments = parser.parse_args()
    source, target = arguments.source, arguments.target
    logging.basicConfig(format="%(levelname)s: %(message)s", force=True)  # replaces what a library set at import
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # the error names a failed write; orbax's traces repeat it
    try:
        _convert(source, target, dtype=arguments.dtype)
    except (ValueError, RuntimeError, OSError) as error:
        return failed(error, 1)
    print(f"wrote {target}")
    return 0


def _convert(source: Path, target: Path, *, dtype: str | None) -> None:
    if (source / "params.json").is_file() and not (source / "config.json").is_file():
        raise ValueError(
            f"{source} holds params.json, which is Meta's original layout; transformers converts it to a Hugging Face "
            "directory with convert_llama_weights_to_hf.py, and every Llama can be downloaded as one"
        )
    _, kind, _ = find_model(source)
    if kind is Kind.RUN:
        export_run(source, target, dtype=dtype)
        return
    if dtype is not None:
        raise ValueError(f"--dtype {dtype}: a run holds float32 parameters; leave it out for a directory")
    import_run(source, target)


if __name__ == "__main__":
    sys.exit(main())
