"""Evaluates a model: jaxllm evaluate RUN|RUN@STEP|HF_DIRECTORY [section.key=value ...] [--data PATH ...].

Prints the figures of a run's evaluation as JSON; changes nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from pathlib import Path

if __name__ == "__main__":
    from huge_pages import restart_with_huge_pages

    restart_with_huge_pages()

from interrupts import failed, interruptible


@interruptible
def main() -> int:
    """Parses the command line, evaluates, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="RUN (its newest checkpoint), RUN@STEP, or a Hugging Face directory")
    parser.add_argument("overrides", nargs="*", help="settings in place of the run's, e.g. training.eval_batches=100")
    parser.add_argument("--data", action="append", default=[], metavar="[NAME=]PATH", help="a set; may be repeated")
    arguments, dashed = parser.parse_known_intermixed_args()
    pairs = [
        (each.rpartition("=")[0] or re.sub(r"\W+", "_", Path(each).name.split(".")[0]), each.rpartition("=")[2])
        for each in arguments.data
    ]
    if len(dict(pairs)) < len(pairs):
        parser.error("sets of --data need different names (NAME=PATH)")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("jaxllm").setLevel(logging.INFO)  # libraries log warnings only
    from display.evaluation import evaluate_path
    from gpu_settings import prepare_process

    prepare_process()
    sets = [f"data.validation={json.dumps(dict(pairs))}"] if pairs else []
    try:
        print(json.dumps(evaluate_path(arguments.path, [*arguments.overrides, *dashed, *sets]), indent=1))
    except (ValueError, RuntimeError, OSError) as error:
        return failed(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
