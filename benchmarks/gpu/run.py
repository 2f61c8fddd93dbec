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
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.common import RESULT
from benchmarks.gpu.table import table

ROOT = Path(__file__).parent.parent.parent
# In order of worth, because a budget cuts off the end.
PARTS = ("tests", "ceilings", "train", "decode", "baseline", "pretrain")
_LIMITS = {"tests": 240, "ceilings": 60, "train": 180, "decode": 180, "baseline": 420, "pretrain": 420}
_TESTS = ["-m", "pytest", "-q", "-o", "addopts=", "-W", "default", "-p", "no:cacheprovider", "-m", "gpu"]


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
    every = case_names()
    unknown = [name for name in options.names if not any(case.startswith(name) for case in every)]
    if unknown:
        parser.error(f"no case begins with {', '.join(unknown)}; --list names them all")
    names = [name for name in every if not options.names or name.startswith(tuple(options.names))]
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
    print(table(record.document()))
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def run_case(name: str, *, toy: bool, environment: dict[str, str]) -> dict[str, Any]:
    """The result of one case, or its error; never raises for what the case does."""
    part, case = name.split("/")
    command = [sys.executable, "-m", "benchmarks.gpu.run", "--one", name, *(["--dry-run"] if toy else [])]
    if part == "tests":
        command = [sys.executable, *_TESTS, *(["--collect-only"] if toy else []), *gpu_test_files()]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A session of its own, so that a case that takes too long goes with all processes that it started.
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes) as process:
        try:
            stdout, stderr = process.communicate(timeout=_LIMITS[part])
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return {"part": part, "case": case, "error": f"took more than {_LIMITS[part]} s"}
    lines = stdout.strip().splitlines() or [""]
    if process.returncode != 0:
        tail = "\n".join([*lines[-5:], *stderr.strip().splitlines()[-5:]])
        return {"part": part, "case": case, "error": tail[-1500:]}
    found = [line.removeprefix(RESULT) for line in lines if line.startswith(RESULT)]
    return json.loads(found[-1]) if found else {"part": part, "case": case, "summary": lines[-1]}


def gpu_test_files() -> list[str]:
    """Test files with a GPU test; the others may need packages that a machine without a network lacks."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path) for path in paths if "mark.gpu" in path.read_text(encoding="utf-8")]


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
        self._facts: dict[str, Any] = {"device": "toy sizes", "versions": {}, "commit": "none"}
        self._path, self._results = None, {}
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
            self._path.write_text(json.dumps(self.document(), indent=1) + "\n", encoding="utf-8")

    def document(self) -> dict[str, Any]:
        """The machine and all results, old ones included."""
        return {**self._facts, "results": list(self._results.values())}


def _first_line(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout.strip().splitlines() or ["unknown"])[-1]


if __name__ == "__main__":
    sys.exit(main())
