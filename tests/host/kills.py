"""SIGKILL of one of two processes at random moments: python -m tests.host.kills --count 20 [--seed 0] [--folder DIR].

After each kill the other process must end by itself with a status that is not 0, and the same command resumes. No save
may be lost, and the run must end with the bits of one that nothing has disturbed, on the same layout.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from jaxllm.run.record import read_metrics
from tests.conftest import write_corpus
from tests.host.launching import finish, launch
from tests.host.test_processes import write

STEPS = 40


def ends(folder: Path) -> list[tuple[int, object, object]]:
    """Fingerprint and loss of each step, however often it was done."""
    rows: dict[int, dict[str, object]] = {}
    for row in read_metrics(folder / "metrics.jsonl"):
        rows.setdefault(row["step"], {}).update(row)
    return [(step, row.get("fingerprint"), row.get("loss")) for step, row in sorted(rows.items())]


def newest(folder: Path) -> int:
    """The step of the newest checkpoint that is whole by its name."""
    names = [path.name for path in (folder / "checkpoints").glob("*")] if folder.exists() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def main() -> int:
    """Prints each kill, and whether the end is the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="default a temporary one")
    options = parser.parse_args()
    root = options.folder or Path(tempfile.mkdtemp(prefix="kills"))
    root.mkdir(exist_ok=True)
    write_corpus(root / "corpus")
    config = write(root, "llama", steps=STEPS, eval_every=STEPS)
    begin = time.monotonic()
    assert [each.status for each in finish(launch(config, count=2, devices=2))] == [0, 0]
    seconds, rng, killed = time.monotonic() - begin, np.random.default_rng(options.seed), 0
    expected, disturbed, failures = ends(root / "llama"), 0, 0
    while killed < options.count:
        target, disturbed = root / f"killed{disturbed}", disturbed + 1
        while True:
            before = newest(target)
            started = launch(config, f"training.run_dir={target}", count=2, devices=2)
            last = killed == options.count
            victim, moment = started[int(rng.integers(2))], float(rng.uniform(0, 1.2 * seconds))
            deadline = time.monotonic() + moment
            while not last and time.monotonic() < deadline and all(each.poll() is None for each in started):
                time.sleep(0.005)
            alive = all(each.poll() is None for each in started)
            kept, at = newest(target), time.monotonic()
            if not last and alive:
                victim.kill()
                killed += 1
            statuses = [each.status for each in finish(started)]
            if statuses == [0, 0]:
                break
            took, after = time.monotonic() - at, newest(target)
            bad = 0 in statuses or took > 120 or after < max(before, kept)
            failures += bad
            print(
                f"kill {killed} at {moment:.1f} s, {statuses} after {took:.1f} s, step {after}", "BAD" * bad, flush=True
            )
        same = ends(target) == expected
        failures += not same
        print(f"{target.name}: {'bitwise' if same else 'DIFFERS'}", flush=True)
    print(f"{killed} kills, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
