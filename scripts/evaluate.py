"""Evaluates a model: jaxllm evaluate RUN|RUN@STEP|HF_DIRECTORY [section.key=value ...] [--data PATH ...].

Prints the figures of a run's evaluation as JSON, or a table of tasks; changes nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from importlib import import_module

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
    group = parser.add_argument_group("in place of text, tasks of lm-evaluation-harness (pip install 'jaxllm[eval]')")
    group.add_argument("--tasks", metavar="NAME,...", help="tasks, or groups of them, such as lambada_openai,piqa")
    group.add_argument("--task-path", metavar="FOLDER", help="YAML files of further tasks")
    group.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question (the task's own)")
    group.add_argument("--limit", type=int, metavar="N", help="only the first N documents of each task")
    group.add_argument("--batch-size", type=int, metavar="N", help="rows at a time (8)")
    arguments, dashed = parser.parse_known_intermixed_args()
    options = {name: getattr(arguments, name) for name in ("task_path", "num_fewshot", "limit", "batch_size")}
    settings = [*arguments.overrides, *dashed]
    if arguments.tasks is not None and (text := [*settings, *(f"--data {each}" for each in arguments.data)]):
        parser.error(f"settings, --data and unknown options cannot be used with --tasks; leave out {' '.join(text)}")
    if arguments.tasks is None and (given := [name for name, value in options.items() if value is not None]):
        parser.error(f"--{given[0].replace('_', '-')} needs --tasks NAME,...")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("jaxllm").setLevel(logging.INFO)  # libraries log warnings only
    from display.evaluation import evaluate_path, named_sets
    from gpu_settings import prepare_process

    prepare_process()
    try:
        if arguments.tasks is not None:
            tasks = import_module("display.tasks")  # needs an extra
            print(tasks.evaluate_tasks(arguments.path, arguments.tasks.split(","), **options))
        else:
            print(json.dumps(evaluate_path(arguments.path, [*settings, *named_sets(arguments.data)]), indent=1))
    except (ImportError, ValueError, RuntimeError, OSError) as error:
        return failed(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
