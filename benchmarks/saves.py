"""Times a save of 46 MB in this checkout and in another: a process of each saves in turn.

    git worktree add --detach ../before 2225bdf
    python -m benchmarks.saves ../before [--saves 40]

"blocked" is the time that training waits; "whole" ends when the checkpoint has its name.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu.record import ROOT
from benchmarks.report import spread
from benchmarks.sides import processor

# Runs with the package of either checkout; the module and arguments after ImportError are those of 2225bdf.
_WORKER = """
import pathlib, sys, time
import jax
try:
    from jaxllm.storage.checkpoint import Checkpoints
    options = {}
except ImportError:
    from jaxllm.training.checkpoint import Checkpoints
    options = {"validation_loss": None}
keys = jax.random.split(jax.random.key(0), 10)
state = {f"leaf{i}": jax.random.normal(keys[i], (1000, 1150)) for i in range(10)}
checkpoints = Checkpoints(pathlib.Path(sys.argv[1]), keep=2)
for step, _ in enumerate(sys.stdin, start=1):
    begin = time.perf_counter()
    checkpoints.save(step, state, {"position": step}, **options)
    blocked = time.perf_counter() - begin
    checkpoints.wait()
    print(blocked, time.perf_counter() - begin, flush=True)
checkpoints.close()
"""


def start(checkout: Path, folder: Path) -> subprocess.Popen[str]:
    """Starts a process that saves once per line of its input and prints both times."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-c", _WORKER, str(folder)]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def save(worker: subprocess.Popen[str]) -> list[float]:
    """Seconds that one save blocks, and that it takes in whole."""
    assert worker.stdin and worker.stdout
    worker.stdin.write("\n")
    worker.stdin.flush()
    return [float(each) for each in worker.stdout.readline().split()]


def main() -> None:
    """Alternates the checkouts and prints the milliseconds of a save in both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="folder of another checkout")
    parser.add_argument("--saves", type=int, default=40, help="of each")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkouts = {"here": ROOT, "other": options.other.resolve()}
        workers = {name: start(checkout, Path(folder) / name) for name, checkout in checkouts.items()}
        found: dict[str, list[list[float]]] = {name: [] for name in workers}
        for _ in range(options.saves + 2):
            for name, worker in workers.items():
                found[name].append(save(worker))
        for worker in workers.values():
            worker.communicate()
    for i, kind in enumerate(("blocked", "whole")):
        here, other = ([1000 * each[i] for each in found[name][2:]] for name in checkouts)  # the first two are warm-up
        ratio = spread([a / b for a, b in zip(here, other, strict=True)])
        print(f"{kind}: here {spread(here)['median']:.1f} ms, other {spread(other)['median']:.1f} ms, ", end="")
        print(f"ratio {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})")
    print(processor())


if __name__ == "__main__":
    main()
