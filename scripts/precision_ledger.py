"""Lists every dtype decision of a run's train step: jaxllm ledger CONFIG [section.key=value ...].

Exits with 1 when a sum or an island (a norm, a softmax, ...) is below float32 and not excused by precision.islands.
"""

from __future__ import annotations

import argparse
import sys

from interrupts import failed, interruptible
from jaxllm.config.file import load_config


@interruptible
def main() -> int:
    """Parses the command line, reads the train step, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file of the run, or the name of a config of jaxllm, e.g. llama_tiny")
    parser.add_argument("overrides", nargs="*", help="settings after the file, e.g. precision.compute=bfloat16")
    arguments, dashed = parser.parse_known_intermixed_args()
    try:
        config = load_config(arguments.config, [*arguments.overrides, *dashed])
        from display.ledger import table
        from jaxllm.study.ledger import allowed, train_step_ledger, violations

        entries, excused = train_step_ledger(config), allowed(config.precision)
    except ValueError as error:  # of the config, or of what cannot run here
        return failed(error)
    print(table(entries, excused))
    bad = violations(entries, excused)
    print(f"{len(entries)} kinds of operations, {len(bad)} below float32 that should not be (marked LOW)")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
