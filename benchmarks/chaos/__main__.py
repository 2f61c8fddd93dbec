"""The command line of benchmarks.chaos."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import benchmarks.chaos
from benchmarks.chaos import chains, damage, inputs
from benchmarks.chaos.lanes import ROOT, Lane, make_lane
from benchmarks.chaos.tally import Tally, table
from benchmarks.sides import processor

# Faults of each campaign for both families together: of the small profile, and of the large one.
COUNTS = {
    "kills": (4, 200),
    "signals": (2, 40),
    "disks": (1, 20),
    "renames": (1, 20),
    "flips": (12, 500),
    "truncations": (2, 100),
    "deletions": (2, 100),
    "zeros": (2, 100),
    "resumes": (1, 40),
    "metrics": (40, 300),
    "configs": (60, 400),
    "documents": (8, 200),
    "directories": (16, 400),
}
_CHAINS = {"kills": chains.kills, "signals": chains.signals, "disks": chains.disks, "renames": chains.renames}
_DAMAGES = {
    "flips": damage.flipped,
    "truncations": damage.truncated,
    "deletions": damage.deleted,
    "zeros": damage.zeroed,
}
_OTHERS = {"resumes": damage.resumes, "metrics": damage.records, "directories": inputs.directories}


def main() -> int:
    """Runs the campaigns and prints the table."""
    parser = argparse.ArgumentParser(
        description=benchmarks.chaos.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--large", action="store_true", help="the counts of docs/reliability.md")
    parser.add_argument("--steps", type=int, help="of each run; default 8, large 24")
    parser.add_argument("--only", nargs="+", choices=COUNTS, help="campaigns; all without any")
    parser.add_argument(
        "--folder", type=Path, help="for the runs, kept for the next campaign of these --steps; default a temporary one"
    )
    parser.add_argument("--json", type=Path, help="file for the result")
    for name, (small, large) in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, help=f"faults in all, default {small}, large {large}")
    options = parser.parse_args()
    counts = {name: getattr(options, name) for name in COUNTS}
    counts = {name: COUNTS[name][options.large] if given is None else given for name, given in counts.items()}
    root = options.folder or Path(tempfile.mkdtemp(prefix="chaos"))
    place = root / f"seed{options.seed}"
    begin, tallies = time.perf_counter(), []
    lanes = _lanes(root, options.steps or (24 if options.large else 8))
    for name in options.only or COUNTS:
        for tally in _campaign(name, lanes, place, counts[name], options.seed):
            tallies.append(tally)
            print(" | ".join(map(str, tally.row())), flush=True)
            print("".join(f"  FAILED {each}\n" for each in tally.failures), end="", flush=True)
    minutes, bad = (time.perf_counter() - begin) / 60, [each for tally in tallies for each in tally.failures]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout
    print(f"\n{table(tallies)}\n\nseed {options.seed}, commit {commit.strip()}, {processor()}, {minutes:.1f} minutes")
    if options.json:
        document = {"seed": options.seed, "commit": commit.strip(), "machine": processor(), "minutes": minutes}
        document |= {"rows": [tally.row() for tally in tallies], "failures": bad}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if options.folder is None:
        shutil.rmtree(root, ignore_errors=True)
    return 1 if bad else 0


def _lanes(root: Path, steps: int) -> list[Lane]:
    """Both families, one of them with log_every above 1."""
    sys.path.insert(0, str(ROOT / "scripts"))
    # What a start needs is imported before the first fork.
    for name in ("pretrain", "jaxllm.run.load", "jaxllm.run.trainer", "matplotlib.backends.backend_agg"):
        importlib.import_module(name)
    return [make_lane(root, "llama", log_every=1, steps=steps), make_lane(root, "t5", log_every=3, steps=steps)]


def _campaign(name: str, lanes: list[Lane], root: Path, count: int, seed: int) -> Iterator[Tally]:
    if name in ("configs", "documents"):
        yield {"configs": inputs.configs, "documents": inputs.documents}[name](root, count, seed)
        return
    # A start of the second, a T5, takes twice as long.
    first = round(count * (2 / 3 if name in _CHAINS or name == "resumes" else 1 / 2))
    for lane, share in zip(lanes, (first, count - first), strict=True):
        if share and name in _DAMAGES:
            yield damage.checkpoints(lane, root, share, seed, how=_DAMAGES[name])
        elif share:
            yield {**_CHAINS, **_OTHERS}[name](lane, root, share, seed)


if __name__ == "__main__":
    sys.exit(main())
