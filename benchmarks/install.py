"""What an installation costs: jaxllm's wheel, up to a first training step, next to transformers with torch.

    python -m benchmarks.install

Each is installed by one `pip install` into a new environment. The seconds depend on the network and on pip's cache.
torch is the CPU build in the version of the extra `parity`, where pip finds it. On Linux, `transformers[torch]` alone
installs the build for NVIDIA GPUs, which is several times as large. Sizes are bytes of the environment's files without
pip. Results go to benchmarks/results/install_cpu.json.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

from benchmarks.sides import environment, save

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Installs both, trains a step and prints a line for each."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (torch,) = [each for each in extras["parity"] if each.startswith("torch")]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        _run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT, folder=folder)
        (wheel,) = folder.glob("*.whl")
        sides = {"jaxllm": [str(wheel)], "transformers[torch]": ["transformers[torch]", torch]}
        found = {name: install(folder / re.sub(r"\W", "", name), packages) for name, packages in sides.items()}
        found["jaxllm"]["first_step_seconds"] = first_step(folder / "jaxllm" / "bin" / "jaxllm", folder)
    for name, values in found.items():
        print(name, " ".join(f"{key} {value:.0f}" for key, value in values.items()))
    save("install", {"benchmark": "install", **environment(), "sides": found})


def install(place: Path, packages: list[str]) -> dict[str, Any]:
    """Seconds, megabytes and number of packages of one `pip install` into a new environment."""
    _run(sys.executable, "-m", "venv", place, folder=place.parent)
    before, begin = _size(place), time.perf_counter()
    _run(place / "bin" / "pip", "install", "-q", *packages, folder=place.parent)
    seconds = time.perf_counter() - begin
    count = len(list(place.glob("lib/python*/site-packages/*.dist-info"))) - 1  # without pip
    return {"seconds": seconds, "megabytes": (_size(place) - before) / 1e6, "packages": count}


def first_step(program: Path, folder: Path) -> float:
    """Seconds from `jaxllm pretrain llama_tiny` to its first step: corpus, tokenizer and compilation included."""
    begin, command = time.perf_counter(), [program, "pretrain", "llama_tiny", "training.steps=1"]
    with subprocess.Popen(command, cwd=folder, env=_clean(), stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            if re.search(r"\bstep +1\b", line):
                return time.perf_counter() - begin
    raise SystemExit(f"{program} ended with status {process.returncode} before its first step")


def _run(*command: str | Path, folder: Path) -> None:
    subprocess.run(list(map(str, command)), cwd=folder, env=_clean(), check=True)


def _clean() -> dict[str, str]:
    """The environment without this clone on the path, and with lines that are printed at once."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {"PYTHONUNBUFFERED": "1"}


def _size(place: Path) -> int:
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file() and not path.is_symlink())


if __name__ == "__main__":
    main()
