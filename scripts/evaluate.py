"""Evaluates a model: python scripts/evaluate.py RUN|RUN@STEP|HF_DIRECTORY [section.key=value ...] [--data PATH ...].

Prints the figures of a run's evaluation as JSON, or with --tasks the table of lm-evaluation-harness; changes nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

if __name__ == "__main__":
    from huge_pages import restart_with_huge_pages

    restart_with_huge_pages()

from interrupts import interruptible


@interruptible
def main() -> int:
    """Parses the command line, evaluates, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="RUN (its newest checkpoint), RUN@STEP, or a Hugging Face directory")
    parser.add_argument("overrides", nargs="*", help="settings in place of the run's, e.g. training.eval_batches=100")
    parser.add_argument("--data", action="append", default=[], metavar="[NAME=]PATH", help="a set; may be repeated")
    parser.add_argument("--tasks", help="tasks of lm-evaluation-harness, separated by commas (needs the extra eval)")
    parser.add_argument("--task-path", help="folder with YAML files of further tasks")
    arguments = parser.parse_intermixed_args()
    pairs = [(each.rpartition("=")[0] or Path(each).stem, each.rpartition("=")[2]) for each in arguments.data]
    if len(dict(pairs)) < len(pairs) or (arguments.tasks and (arguments.overrides or pairs)):
        parser.error("sets of --data need different names (NAME=PATH), and --tasks takes neither sets nor settings")
    logging.basicConfig(level=logging.WARNING if arguments.tasks else logging.INFO, format="%(message)s")
    from jaxllm.host.device import prepare_process
    from jaxllm.run import evaluation, load

    prepare_process()
    sets = [f"data.validation={json.dumps(dict(pairs))}"] if pairs else []
    try:
        if arguments.tasks:
            print(_table(load.load_lm(arguments.path), arguments.tasks.split(","), arguments.task_path))
        else:
            print(json.dumps(evaluation.evaluate_path(arguments.path, [*arguments.overrides, *sets]), indent=1))
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        hint = "; --tasks needs: pip install 'jaxllm[eval]'" if isinstance(error, ImportError) else ""
        parser.exit(2, f"error: {error}{hint}\n")
    return 0


def _table(model: object, tasks: list[str], folder: str | None) -> str:
    import lm_eval.tasks

    manager = lm_eval.tasks.TaskManager(include_path=folder)
    return lm_eval.utils.make_table(lm_eval.simple_evaluate(model, tasks=tasks, task_manager=manager))


if __name__ == "__main__":
    sys.exit(main())
