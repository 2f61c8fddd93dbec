"""Runs parts by name, each case in its own process, and keeps what is measured even when a part fails.

    python -m benchmarks.gpu.run [NAME ...] [--dry-run] [--list] [--budget SECONDS] [--out FOLDER]

A NAME is a group, or the beginning of part/case; without one it is the group `first`, or in a dry run every case. All
cases together take about an hour, so they are in groups that each fit into ten minutes. Results go to
FOLDER/gpu_DEVICE.json after every case, newest values winning.
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
# What to run first, second and so on; cases in order of worth, because a budget cuts off the end.
GROUPS = {
    "first": (
        *("tests/gpu", "ceilings/matmul", "ceilings/copy", "train/llama_1b", "train/t5_large"),
        *("decode/1b_b1", "decode/8b_b1", "decode/t5_large_b1", "baseline/llama_1b_decode"),
    ),
    "minutes_bf16": ("pretrain/llama_bf16", "pretrain/t5_bf16"),
    "minutes_fp16": ("pretrain/llama_fp16", "pretrain/t5_fp16"),
    "more_train": (
        *("train/llama_8b_8layers", "train/t5_base", "train/llama_1b_fp16", "train/t5_large_fp16"),
        *("train/llama_1b_packed", "train/llama_8b_8layers_packed", "train/llama_1b_accumulated"),
        "train/llama_1b_no_remat",
    ),
    "more_baseline": ("baseline/llama_1b_train", "baseline/t5_large_train", "baseline/llama_8b_decode"),
    "more_decode": (
        *("decode/1b_b8", "decode/1b_b64", "decode/8b_b8", "decode/8b_b64", "decode/t5_large_b8"),
        *("decode/t5_large_b64", "decode/8b_int8_b1", "decode/1b_b1_8k", "decode/8b_b1_8k"),
        "baseline/t5_large_decode",
    ),
    "minutes_script": ("pretrain/script_llama", "pretrain/script_t5"),
}
# Seconds that a case of a part should take, its start and compilation included: no GPU has measured them yet.
PLAN = {"tests": 100, "ceilings": 20, "train": 70, "decode": 45, "baseline": 150, "pretrain": 240}
# What a case may take at most.
_LIMITS = {"tests": 240, "ceilings": 60, "train": 180, "decode": 180, "baseline": 420, "pretrain": 420}
# Ten minutes, less what a machine needs to begin and to hand over results.
BUDGET = 570
_TESTS = ["-m", "pytest", "-q", "-o", "addopts=", "-W", "default", "-p", "no:cacheprovider", "-m", "gpu"]


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line and runs what it names; 1 when a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, on any machine, nothing written")
    parser.add_argument("--list", action="store_true", help="groups and cases with the minutes they should take")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all; what does not fit is left out")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--one", help="run this case in this process and print its result")
    options = parser.parse_args(arguments)
    if options.one:
        part, case = options.one.split("/")
        importlib.import_module(f"benchmarks.gpu.{part}").main(case, toy=options.dry_run)
        return 0
    unknown = [name for name in options.names if not cases_of(name)]
    if unknown:
        parser.error(f"no group or case begins with {', '.join(unknown)}; --list names them all")
    if options.list:
        for group in GROUPS:
            minutes = sum(map(planned, GROUPS[group])) / 60
            print("\n  ".join([f"{group}: {minutes:.1f} minutes", *GROUPS[group]]))
        return 0
    wanted = options.names or (GROUPS if options.dry_run else ["first"])
    names = list(dict.fromkeys(case for name in wanted for case in cases_of(name)))
    return run_all(names, toy=options.dry_run, budget=options.budget, out=options.out)


def cases_of(name: str) -> list[str]:
    """The cases of a group, or those that begin so; in order of worth."""
    every = [case for group in GROUPS.values() for case in group]
    return [case for case in every if case in GROUPS.get(name, ()) or case.startswith(name)]


def planned(name: str) -> int:
    """Seconds that a case should take."""
    return PLAN[name.split("/")[0]]


def run_all(names: list[str], *, toy: bool, budget: float, out: Path) -> int:
    """Runs cases one after the other."""
    start, failed, record = time.monotonic(), [], Record(out, toy=toy)
    for name in names:
        part, case = name.split("/")
        left = budget - (time.monotonic() - start)
        if left < (0 if toy else planned(name)):
            record.add({"part": part, "case": case, "skipped": "no time left"})
            print(f"{name:32} left out: {max(left, 0):.0f} s remain of {budget:.0f}", flush=True)
            continue
        before = time.monotonic()
        limit = _LIMITS[part] if toy else min(_LIMITS[part], left)
        result = run_case(name, toy=toy, limit=limit, environment=record.environment)
        result["wall_seconds"] = round(time.monotonic() - before, 1)
        record.add(result)
        if "error" in result:
            failed.append(name)
        print(f"{name:32} {result['wall_seconds']:6.1f} s  {summary(result)}", flush=True)
    print(table(record.document()))
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def run_case(name: str, *, toy: bool, limit: float, environment: dict[str, str]) -> dict[str, Any]:
    """The result of one case, or its error; never raises for what the case does."""
    part, case = name.split("/")
    command = [sys.executable, "-m", "benchmarks.gpu.run", "--one", name, *(["--dry-run"] if toy else [])]
    if part == "tests":
        command = [sys.executable, *_TESTS, *(["--collect-only"] if toy else []), *gpu_test_files()]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A session of its own, so that a case that takes too long goes with all processes that it started.
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes) as process:
        try:
            stdout, stderr = process.communicate(timeout=limit)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return {"part": part, "case": case, "error": f"took more than {limit:.0f} s"}
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
