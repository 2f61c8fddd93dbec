"""Runs parts by name, each case in its own process, and keeps what is measured even when a part fails.

    python -m benchmarks.gpu.run [NAME ...] [--dry-run] [--list] [--budget SECONDS] [--out FOLDER]

A NAME is the beginning of part/case. Results go to FOLDER/gpu_DEVICE.json after every case, newest values winning.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.common import RESULT

ROOT = Path(__file__).parent.parent.parent
# In order of worth, because a budget cuts off the end.
PARTS = ("tests", "ceilings", "train", "decode", "baseline", "pretrain")
_LIMITS = {"tests": 240, "ceilings": 60, "train": 180, "decode": 180, "baseline": 420, "pretrain": 420}
_TESTS = ["-m", "pytest", "-q", "-o", "addopts=", "-W", "default", "-p", "no:cacheprovider", "-m", "gpu", "tests"]


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line and runs what it names; 1 when a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, on any machine, nothing written")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--budget", type=float, default=570, help="start no case after so many seconds")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--one", help="run this case in this process and print its result")
    options = parser.parse_args(arguments)
    if options.one:
        part, case = options.one.split("/")
        importlib.import_module(f"benchmarks.gpu.{part}").main(case, toy=options.dry_run)
        return 0
    names = [name for name in case_names() if not options.names or name.startswith(tuple(options.names))]
    if options.list:
        print("\n".join(names))
        return 0
    return run_all(names, toy=options.dry_run, budget=options.budget, out=options.out)


def case_names() -> list[str]:
    """Every part/case, in order."""
    names = ["tests/gpu", "ceilings/matmul", "ceilings/copy"]
    for part in PARTS[2:]:
        names += [f"{part}/{case}" for case in importlib.import_module(f"benchmarks.gpu.{part}").CASES]
    return names


def run_all(names: list[str], *, toy: bool, budget: float, out: Path) -> int:
    """Runs cases one after the other."""
    start, failed, record = time.monotonic(), [], Record(out, toy=toy)
    for name in names:
        left = budget - (time.monotonic() - start)
        if left <= 0:
            record.add({"part": name.split("/")[0], "case": name.split("/")[1], "skipped": "no time left"})
            continue
        before = time.monotonic()
        result = run_case(name, toy=toy, environment=record.environment)
        result["wall_seconds"] = round(time.monotonic() - before, 1)
        record.add(result)
        if "error" in result:
            failed.append(name)
        print(f"{name:32} {result['wall_seconds']:6.1f} s  {summary(result)}", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def run_case(name: str, *, toy: bool, environment: dict[str, str]) -> dict[str, Any]:
    """The result of one case, or its error; never raises for what the case does."""
    part, case = name.split("/")
    command = [sys.executable, "-m", "benchmarks.gpu.run", "--one", name, *(["--dry-run"] if toy else [])]
    if part == "tests":
        command = [sys.executable, *(["-c", "print('1 skipped')"] if toy else _TESTS)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=_LIMITS[part], check=False
        )
    except subprocess.TimeoutExpired:
        return {"part": part, "case": case, "error": f"took more than {_LIMITS[part]} s"}
    lines = done.stdout.strip().splitlines() or [""]
    if done.returncode != 0:
        tail = "\n".join([*lines[-5:], *done.stderr.strip().splitlines()[-5:]])
        return {"part": part, "case": case, "error": tail[-1500:]}
    found = [line.removeprefix(RESULT) for line in lines if line.startswith(RESULT)]
    return json.loads(found[-1]) if found else {"part": part, "case": case, "summary": lines[-1]}


def summary(result: dict[str, Any]) -> str:
    """The figures of a result that a person looks for first."""
    if "error" in result:
        return "FAILED: " + result["error"].splitlines()[-1][:150]
    keys = ("tokens_per_second", "sequences_per_second", "mfu", "part_of_measured_bandwidth", "ratio", "last_loss")
    keys += ("tflops", "terabytes_per_second", "peak_gb", "compile_seconds", "loss", "summary")
    shown = [(key, result[key]) for key in keys if key in result]
    return "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown)


class Record:
    """The results file of a device, rewritten after every case; in a dry run nothing is written."""

    def __init__(self, folder: Path, *, toy: bool) -> None:
        """Finds out what this machine is, in another process: this one must not hold the GPU."""
        self.environment = dict(os.environ)
        self._facts, self._path, self._results = {}, None, {}
        if toy:
            return
        self.environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
        from jaxllm.training.device import TRAIN_FLAGS, accepted_flags

        flags = " ".join([*accepted_flags(TRAIN_FLAGS), os.environ.get("XLA_FLAGS", "")]).strip()
        self.environment["XLA_FLAGS"] = flags
        device = _first_line([sys.executable, "-c", "import jax; print(jax.devices()[0].device_kind)"])
        packages = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
        installed = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
        self._facts = {
            "device": device,
            "versions": {name: installed[name] for name in packages if name in installed},
            "commit": _first_line(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]),
            "flags": flags,
        }
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"gpu_{device.replace(' ', '_')}.json"
        if self._path.exists():
            old = json.loads(self._path.read_text(encoding="utf-8"))
            self._results = {f"{row['part']}/{row['case']}": row for row in old["results"]}

    def add(self, result: dict[str, Any]) -> None:
        """Keeps a result; one that failed or was skipped doesn't replace one that was measured."""
        name = f"{result['part']}/{result['case']}"
        poor = "error" in result or "skipped" in result
        if poor and not {"error", "skipped"} & set(self._results.get(name, {"error": ""})):
            return
        facts = {key: self._facts[key] for key in ("commit", "flags") if key in self._facts}
        self._results[name] = {**result, **facts, "date": time.strftime("%Y-%m-%d")}
        if self._path is not None:
            document = {**self._facts, "results": list(self._results.values())}
            self._path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _first_line(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout.strip().splitlines() or ["unknown"])[-1]


if __name__ == "__main__":
    sys.exit(main())
