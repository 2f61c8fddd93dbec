"""Draws a metric of one or more runs over steps: jaxllm plot runs/a runs/b --metric grad_norm."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from interrupts import failed, interruptible


@interruptible
def main() -> int:
    """Parses the command line, draws the figure, prints its path."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="training.run_dir of a run; it may be training meanwhile"
    )
    metric = "column of metrics.jsonl, without validation/; by default bits per byte, or loss where some run has none"
    parser.add_argument("--metric", metavar="NAME", help=metric)
    parser.add_argument(
        "--out", default="runs.png", metavar="FILE", help="figure to write: .png, .svg or .pdf (%(default)s)"
    )
    arguments = parser.parse_args()
    from jaxllm.run.record import read_metrics, runs_figure
    from jaxllm.storage.folder import METRICS

    try:
        paths = {name: Path(run) / METRICS for name, run in zip(names(arguments.runs), arguments.runs, strict=True)}
        for path in paths.values():
            if not path.is_file():
                raise ValueError(
                    f"{path.parent} has no {METRICS}; give the folder of a run, as training.run_dir names it"
                )
        runs = {name: read_metrics(path) for name, path in paths.items()}
        columns = [{key for row in rows for key in row} for rows in runs.values()]
        usual = ("bits_per_byte", "bits_per_target_byte", "loss")
        usual = next((name for name in usual if all(name in each for each in columns)), "loss")
        runs_figure(runs, arguments.metric or usual).savefig(arguments.out, dpi=130)
    except (ValueError, OSError) as error:
        return failed(error)
    print(arguments.out)
    return 0


def names(runs: list[str]) -> list[str]:
    """The shortest ends of the paths that differ, such as a/small and b/small; ValueError for a folder given twice."""
    paths = [Path(run).resolve() for run in runs]
    if len(set(paths)) < len(paths):
        raise ValueError(f"a run is given twice: {', '.join(runs)}")
    for count in range(1, 1 + max(len(path.parts) for path in paths)):
        ends = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(ends)) == len(ends):
            break
    return ends


if __name__ == "__main__":
    sys.exit(main())
