"""Shows what a run's data looks like to its model: jaxllm inspect t5_tiny --audit."""

from __future__ import annotations

import argparse
import itertools
import logging
import sys

from rich.console import Console
from rich.panel import Panel

from interrupts import failed, interruptible
from jaxllm.config.file import load_config


@interruptible
def main() -> int:
    """Prints examples in colour, or the audit of a corpus."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="YAML file of the run, or the name of a config of jaxllm, e.g. t5_tiny")
    parser.add_argument("overrides", nargs="*", help="settings after the file, e.g. data.noise_density=0.3")
    parser.add_argument("--examples", type=int, default=3, help="examples to print")
    parser.add_argument("--audit", action="store_true", help="account for every token of many documents instead")
    parser.add_argument("--picture", metavar="FILE", help="with --audit: write a picture of the span lengths")
    parser.add_argument("--documents", type=int, default=500, help="documents of the audit")
    arguments, dashed = parser.parse_known_intermixed_args()
    for name in (name for name in ("examples", "documents") if getattr(arguments, name) < 1):
        parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    logging.basicConfig(level=logging.WARNING)
    from display.corpus import audit, draw_spans, open_corpus, report, view
    from display.in_place import check_in_place
    from jaxllm.data.packing import unpack_pairs

    console = Console()
    try:
        config = load_config(arguments.config, [*arguments.overrides, *dashed])
        check_in_place(config, arguments.config, arguments.overrides)
        with open_corpus(config) as pipeline:
            if arguments.audit:
                console.print(report(found := audit(pipeline, documents=arguments.documents)))
                draw_spans(found, arguments.picture)
                return 0
            examples = itertools.chain.from_iterable(unpack_pairs(batch) for batch in pipeline)
            for inputs, targets in itertools.islice(examples, arguments.examples):
                source = pipeline.recipe.restore(inputs, targets)
                seen = view(inputs, targets, source=source, tokenizer=pipeline.tokenizer)
                for title, text in zip(seen._fields, seen, strict=True):
                    console.print(Panel(text, title=title, title_align="left"))
    except (ValueError, RuntimeError, OSError) as error:
        return failed(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
