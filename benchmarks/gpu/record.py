"""The results of a machine: what it is, and a JSON file that is rewritten after every case."""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.host.device import nvidia_devices

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
_ASK = "import jax; print(jax.default_backend(), jax.devices()[0].device_kind, sep='|')"


class NoGpuError(RuntimeError):
    """This machine has no GPU that jax can use; the message names what was found."""


class Machine(NamedTuple):
    """Where cases run."""

    device: str  # jax's name of it
    flags: str  # of XLA, from the environment, for every case
    versions: dict[str, str]  # of the packages that decide
    commit: str  # of the sources, or a hash of them where git is missing


TOY = Machine("toy sizes", "", {}, "none")


def find_gpu() -> Machine:
    """What this machine is, found out in another process, because this one must not hold the GPU.

    Raises:
        NoGpuError: when jax has none, or cannot start.
    """
    if not nvidia_devices():
        raise NoGpuError("no NVIDIA GPU here: /dev has no nvidia0 or other; --dry-run runs all at toy sizes anywhere")
    status, output = first_line([sys.executable, "-c", _ASK])
    backend, _, device = output.partition("|")
    if status != 0 or backend != "gpu":
        raise NoGpuError(f"jax uses no GPU here: {output or 'it did not start'}; is jax[cuda13] installed?")
    return Machine(device, os.environ.get("XLA_FLAGS", ""), versions(), commit())


def versions() -> dict[str, str]:
    """Of the packages that decide, as far as they are installed."""
    installed = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    return {name: installed[name] for name in _PACKAGES if name in installed}


def commit() -> str:
    """BENCH_COMMIT, or git's, or, on a machine with neither, a hash of the sources."""
    if given := os.environ.get("BENCH_COMMIT"):
        return given
    status, found = first_line(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
    if status == 0:
        return found
    digest = hashlib.sha256()
    for folder in ("jaxllm", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return f"sources {digest.hexdigest()[:10]}"


def first_line(command: list[str]) -> tuple[int, str]:
    """Status and last line of a command's output; 127 where it does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 127, str(error)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode, lines[-1] if lines else ""


class Record:
    """Results by case: those already in benchmarks/results, then new ones, written to a folder after each."""

    def __init__(self, machine: Machine, folder: Path | None) -> None:
        """Reads what is there; nothing is written without a folder."""
        self.machine = machine
        self._path, self._results = None, {}
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        file = f"gpu_{machine.device.replace(' ', '_')}.json"
        self._path = folder / file
        for path in (RESULTS / file, self._path):
            if path.exists():
                old = json.loads(path.read_text(encoding="utf-8"))
                self._results |= {f"{row['part']}/{row['case']}": row for row in old["results"]}

    def add(self, result: dict[str, Any]) -> None:
        """Keeps a result; one that failed doesn't replace one that was measured."""
        name = f"{result['part']}/{result['case']}"
        if "error" in result and self.measured(name):
            return
        facts = {"commit": self.machine.commit, "versions": self.machine.versions}
        self._results[name] = {**result, **facts, "date": time.strftime("%Y-%m-%d")}
        if self._path is not None:
            new = self._path.with_suffix(".new")
            new.write_text(json.dumps(self.document(), indent=1) + "\n", encoding="utf-8")
            new.replace(self._path)

    def measured(self, name: str) -> bool:
        """Whether there is a whole result of this case."""
        result = self._results.get(name, {"error": ""})
        return "error" not in result and result.get("complete", True) and result.get("tokens_agree", True)

    def document(self) -> dict[str, Any]:
        """The machine and all results, old ones included."""
        return {"device": self.machine.device, "flags": self.machine.flags, "results": list(self._results.values())}
