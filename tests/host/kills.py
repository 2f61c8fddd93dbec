"""SIGKILL of one of two processes at random moments: python -m tests.host.kills [--count 20] [--seed 0] [--folder DIR].

After each kill the other process must end by itself with a status that is not 0: within 120 s, or 330 s where the two
had not found each other. The same command resumes, nothing that was saved may be lost, and each run must end with the
bits of an undisturbed run on the same layout. Several runs are trained at the same time, since a process waits up to
100 s for one that has been killed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxllm.run.record import read_metrics
from tests.conftest import write_corpus
from tests.host.launching import Started, finish, has_handler, launch
from tests.host.runs import write

STEPS, LANES = 40, 4
CONNECTED, ALONE = 120, 330  # seconds


class Tally(NamedTuple):
    """The kills of one run, and their results."""

    kills: int
    bitwise: bool
    failures: int


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


def alive(started: list[Started]) -> bool:
    return all(each.poll() is None for each in started)


def kill_at(started: list[Started], target: Path, moment: float, victim: int) -> tuple[str, bool] | None:
    """Kills one process after `moment` seconds: a report, and whether the other ended well; None if one had ended."""
    before, deadline = newest(target), time.monotonic() + moment
    while time.monotonic() < deadline and alive(started):
        time.sleep(0.005)
    if not alive(started):
        return None
    connected, kept, at = all(map(has_handler, started)), newest(target), time.monotonic()
    started[victim].kill()
    statuses = [each.status for each in finish(started, ALONE + 60)]
    took, after = time.monotonic() - at, newest(target)
    good = 0 not in statuses and took < (CONNECTED if connected else ALONE) and after >= max(before, kept)
    where = f"{moment:.1f} s" if connected else f"{moment:.1f} s, not connected"
    return f"killed {victim} at {where}, {statuses} after {took:.1f} s, step {after}", good


def disturb(config: Path, target: Path, kills: int, seconds: float, rng: np.random.Generator) -> Tally:
    """Kills a run up to `kills` times, lets it end, and compares it with the undisturbed run."""
    done, failures, statuses = 0, 0, [1]
    while done < kills and statuses != [0, 0]:
        started = launch(config, f"training.run_dir={target}", count=2, devices=2)
        found = kill_at(started, target, float(rng.uniform(0, 2 * seconds)), int(rng.integers(2)))
        if found is None:
            statuses = [each.status for each in finish(started)]
            continue
        done, failures = done + 1, failures + (not found[1])
        print(f"{target.name}: {found[0]}", "" if found[1] else "BAD", flush=True)
    if statuses != [0, 0]:
        statuses = [each.status for each in finish(launch(config, f"training.run_dir={target}", count=2, devices=2))]
    same = statuses == [0, 0] and ends(target) == ends(config.with_suffix(""))
    print(f"{target.name}: {statuses}, {'bitwise' if same else 'DIFFERS'}", flush=True)
    return Tally(done, same, failures + (not same))


def main() -> int:
    """Prints each kill, and whether each run ended like the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="a new folder; default a temporary one")
    options = parser.parse_args()
    root = options.folder or Path(tempfile.mkdtemp(prefix="kills"))
    root.mkdir(exist_ok=True)
    write_corpus(root / "corpus")
    config = write(root, "llama", steps=STEPS, eval_every=STEPS)
    begin = time.monotonic()
    assert [each.status for each in finish(launch(config, count=2, devices=2))] == [0, 0]
    seconds = time.monotonic() - begin

    def lane(number: int) -> list[Tally]:
        left, rng = (
            options.count // LANES + (number < options.count % LANES),
            np.random.default_rng([options.seed, number]),
        )
        found: list[Tally] = []
        while left > 0:
            found.append(disturb(config, root / f"run{number}.{len(found)}", left, seconds, rng))
            left -= found[-1].kills
        return found

    with concurrent.futures.ThreadPoolExecutor(LANES) as pool:
        tallies = [tally for tallies in pool.map(lane, range(LANES)) for tally in tallies]
    kills, failures = (sum(tally[i] for tally in tallies) for i in (0, 2))
    killed = [tally.bitwise for tally in tallies if tally.kills]
    print(f"{kills} kills in {len(killed)} runs, {sum(killed)} of them bitwise, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
