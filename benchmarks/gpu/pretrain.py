"""scripts/pretrain.py itself for about a minute: killed after a checkpoint, started again, finished with a sample.

The corpus and its tokenizer come from benchmarks/gpu/carry.sh; without them the script prepares the standard library of
this interpreter, which takes longer.
"""

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.gpu.record import ROOT
from benchmarks.report import report

CARRIED = ROOT / "carried"
_NEEDED = ("grain", "tensorflow_datasets", "array_record")
_FLOAT16 = ["precision.compute=float16", "precision.loss_scale=dynamic"]
_LLAMA = ["model.vocab_size=8192", "training.batch_size=64", "training.accumulation=1"]
_T5 = ["model.vocab_size=8192", "training.batch_size=128", "optimizer.schedule=wsd"]
_RATES = {"llama_125m": "1e-3", "t5_small": "1e-2"}


class Case(NamedTuple):
    """A run of the script."""

    config: str  # a file of configs/, without its ending
    settings: list[str]  # what a run of a minute changes in it


CASES = {
    "llama_fp16": Case("llama_125m", [*_LLAMA, *_FLOAT16]),
    "llama_bf16": Case("llama_125m", _LLAMA),
    "t5_fp16": Case("t5_small", [*_T5, *_FLOAT16]),
    "t5_bf16": Case("t5_small", _T5),
}


def main(name: str, *, toy: bool) -> None:
    """Runs, kills, resumes and reports one case.

    Raises:
        SystemExit: when packages are missing, the script fails, the resumed run does not continue where the killed one
            had saved, or the loss does not fall.
    """
    if missing := [module for module in _NEEDED if importlib.util.find_spec(module) is None]:
        raise SystemExit(f"{name}: {', '.join(missing)} not installed; fill carried/ by benchmarks/gpu/carry.sh")
    with tempfile.TemporaryDirectory() as folder:
        arguments = script_arguments(CASES[name], Path(folder), toy=toy)
        killed, first_seconds = _run_until_checkpoint(arguments, Path(folder))
        report("pretrain", f"{name}_until_killed", killed_at=killed, **_last_values(_rows(Path(folder))))
        before, script = time.perf_counter(), _Script(arguments, Path(folder))
        script.end()
        seconds, resumed, rows = time.perf_counter() - before, script.resumed_from(), _rows(Path(folder))
        sample = (Path(folder) / "run" / "sample.txt").read_text(encoding="utf-8")
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    first, last = losses[min(losses)], losses[max(losses)]
    if not 0 < resumed <= killed:
        raise SystemExit(f"{name}: killed at step {killed}, and resumed from {resumed}")
    if not (np.isfinite(last) and (toy or last < 0.8 * first)):
        raise SystemExit(f"{name}: the loss went from {first} to {last} in {max(losses)} steps")
    report(
        "pretrain",
        name,
        first_loss=first,
        last_loss=last,
        killed_at=killed,
        resumed_from=resumed,
        seconds_to_kill=first_seconds,
        seconds_resumed=seconds,
        sample=sample[-600:],
        **_last_values(rows),
    )


def _last_values(rows: list[dict[str, Any]]) -> dict[str, Any]:
    keys = ("step", "bits_per_byte", "bits_per_target_byte", "tokens_per_second", "mfu", "data_wait")
    keys += ("loss_scale", "skipped", "validation/loss", "validation/bits_per_byte")
    return {key: value for row in rows for key, value in row.items() if key in keys}


class _Script:
    """scripts/pretrain.py in a process; what it prints is printed here as it comes, and kept."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        command = [sys.executable, str(ROOT / "scripts" / "pretrain.py"), *arguments]
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with self.process.stdout or contextlib.nullcontext(()) as output:
            for line in output:
                self.lines.append(line)
                print(line, end="", flush=True)

    def end(self, *, kill: bool = False) -> None:
        """Waits for the end, or brings it about.

        Raises:
            SystemExit: when it ends by itself, and badly.
        """
        if kill:
            self.process.kill()  # its workers end with it
        status = self.process.wait()
        self._reader.join(timeout=10)
        if status != 0 and not kill:
            raise SystemExit(f"scripts/pretrain.py ended with {status}")

    def resumed_from(self) -> int:
        """The step from which it continues, by its log; 0 for a new run."""
        found = re.search(r"resuming .* from step (\d+)", " ".join("".join(self.lines).split()))
        return int(found[1]) if found else 0


def _run_until_checkpoint(arguments: list[str], folder: Path) -> tuple[int, float]:
    """Kills the script some steps after its first checkpoint; the last step it recorded, and the seconds it ran."""
    before, script = time.perf_counter(), _Script(arguments, folder)
    while script.process.poll() is None:
        saved = [int(path.name) for path in (folder / "run" / "checkpoints").glob("*") if path.name.isdigit()]
        last = max((row["step"] for row in _rows(folder)), default=0)
        if saved and last > min(saved):
            script.end(kill=True)
            return last, time.perf_counter() - before
        time.sleep(0.02)
    script.end()
    raise SystemExit("scripts/pretrain.py ended before it could be killed; it needs more steps")


def _rows(folder: Path) -> list[dict[str, Any]]:
    """Whole lines of the run's record."""
    path = folder / "run" / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1] if line]


def script_arguments(case: Case, folder: Path, *, toy: bool) -> list[str]:
    """What stands behind scripts/pretrain.py."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", f"{folder}/cache")
    arguments = [str(ROOT / "configs" / f"{case.config}.yaml"), f"training.run_dir={folder}/run", *case.settings]
    arguments += [f"training.compilation_cache={cache}", f"data.cache_dir={folder}/data", "training.log_every=5"]
    arguments += [f"optimizer.learning_rate={_RATES[case.config]}", *_corpus(folder, toy=toy)]
    if not toy:
        steps = {"steps": 160, "save_every": 40, "eval_every": 160, "eval_batches": 8, "sample_tokens": 64}
        schedule = ["optimizer.warmup_steps=25", *(["optimizer.decay_steps=25"] if "t5" in case.config else [])]
        return [*arguments, *schedule, *(f"training.{key}={value}" for key, value in steps.items())]
    return [*arguments, *_toy_settings(case)]


def _corpus(folder: Path, *, toy: bool) -> list[str]:
    """Settings of the data: the carried corpus, or the standard library of this interpreter, or a little of it."""
    if not toy and not (CARRIED / "tokenizer.json").exists():
        return ["data.source=stdlib"]
    if not toy:
        return ["data.source=files", f"data.path={CARRIED}/corpus.jsonl.gz", f"data.tokenizer={CARRIED}/tokenizer.json"]
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for source in sorted(Path(sysconfig.get_path("stdlib")).glob("a*.py")):
        (corpus / f"{source.stem}.txt").write_text(source.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    return ["data.source=files", f"data.path={corpus}", "data.validation_fraction=0.3", "data.workers=1"]


def _toy_settings(case: Case) -> list[str]:
    model = {"vocab_size": 512, "num_layers": 1, "d_model": 32, "d_ff": 48, "num_heads": 2}
    model |= {"num_kv_heads": 2} if "llama" in case.config else {"head_dim": 8}
    training = {"steps": 40, "batch_size": 8, "save_every": 10, "eval_every": 40, "eval_batches": 1}
    settings = [f"model.{key}={value}" for key, value in model.items()]
    settings += [f"training.{key}={value}" for key, value in {**training, "log_every": 1, "sample_tokens": 8}.items()]
    return [*settings, "data.sequence_length=32", "optimizer.warmup_steps=1", "optimizer.decay_steps=1"]
