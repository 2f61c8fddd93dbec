"""Seconds of a save, in this checkout and in another, through scripts/pretrain.py of both, in turns.

    git worktree add --detach ../before 2225bdf
    python -m benchmarks.saves ../before [--turns 5]

A run that saves each step takes a step and a save between two checkpoints; one that saves each fifth takes five
steps and a save. The times are those of the folders of checkpoints, so that nothing of either checkout is imported.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu.record import ROOT
from benchmarks.report import spread
from benchmarks.sides import processor

_STEPS, _APART = 40, 5
_CONFIG = "configs/llama_tiny.yaml"  # 46 MB of state
_QUICK = (
    "training.batch_size=1 training.eval_every=1000 training.sample_tokens=0 training.keep=99 "
    "optimizer.schedule=constant optimizer.warmup_steps=0 optimizer.decay_steps=0"
)


def interval(checkout: Path, work: Path, save_every: int) -> float:
    """Median seconds between two checkpoints of a run."""
    run = Path(tempfile.mkdtemp(dir=work))
    settings = {"steps": _STEPS, "save_every": save_every, "run_dir": run, "compilation_cache": work / "programs"}
    command = [sys.executable, "scripts/pretrain.py", _CONFIG, f"data.cache_dir={work / 'data'}", *_QUICK.split()]
    command += [f"training.{name}={value}" for name, value in settings.items()]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the run of {checkout} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    steps = sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())
    times = [(run / "checkpoints" / str(step)).stat().st_ctime for step in steps]
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(times))


def save_seconds(checkout: Path, work: Path) -> float:
    """Of one save, without the step before it."""
    each, apart = (interval(checkout, work, every) for every in (1, _APART))
    return (_APART * each - apart) / (_APART - 1)


def main() -> None:
    """Alternates the checkouts and prints the seconds of a save in both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="folder of another checkout")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    sides = {"here": ROOT, "other": options.other.resolve()}
    found: dict[str, list[float]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.turns + 1):  # the first prepares the data and compiles
            for name, checkout in sides.items():
                work = Path(folder) / name
                work.mkdir(exist_ok=True)
                seconds = save_seconds(checkout, work)
                if turn:
                    found[name].append(seconds)
                    print(f"turn {turn} {name}: {seconds:.3f} s", flush=True)
    ratio = spread([a / b for a, b in zip(found["here"], found["other"], strict=True)])
    rows = {name: "{median:.3f} s ({min:.3f} to {max:.3f})".format(**spread(each)) for name, each in found.items()}
    print(f"a save: here {rows['here']}, other {rows['other']}; ratio {ratio['median']:.2f} ", end="")
    print(f"({ratio['min']:.2f} to {ratio['max']:.2f}), {processor()}")


if __name__ == "__main__":
    main()
