"""Runs that several tests check, trained once for all workers; and the end of processes that a test has started."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pytest

from jaxllm.interop.hf import save_hf
from jaxllm.models import build
from jaxllm.run.start import read_run
from tests.conftest import write_corpus
from tests.host.launching import STARTED, train
from tests.host.runs import MODELS, copy_run, half, once, write


@pytest.fixture(autouse=True)
def none_outlives_its_test() -> Iterator[None]:
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.end()


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers share, with a corpus, the configs of both families, and their runs."""
    workers = tmp_path_factory.getbasetemp()
    folder = (workers.parent if "PYTEST_XDIST_WORKER" in os.environ else workers) / "processes"
    folder.mkdir(exist_ok=True)

    failed = threading.Event()

    def train_chain(family: str, *parts: Callable[[Path, str], None]) -> None:
        for part in parts:
            if not failed.is_set():
                part(folder, family)

    def train_all() -> None:
        write_corpus(folder / "corpus")
        for family in MODELS:
            write(folder, family)
        with ThreadPoolExecutor() as pool:
            try:
                for future in as_completed([pool.submit(train_chain, *chain) for chain in CHAINS]):
                    future.result()
            except BaseException:
                failed.set()  # the other chains end, too
                for process in list(STARTED):
                    process.kill()
                raise

    once(folder, "runs", train_all)
    return folder


def train_on_one(folder: Path, family: str) -> None:
    """FAMILY-one on one device, and FAMILY-half-one, which begins with the parameters of FAMILY-one."""
    runs = {f"{family}-one": [], f"{family}-half-one": half(folder, family)}
    commands = [[f"training.run_dir={folder / name}", *overrides] for name, overrides in runs.items()]
    train(folder, "one", family, commands, count=1, devices=1)


def train_on_two(folder: Path, family: str) -> None:
    """The same runs in two processes with two devices each, as FAMILY and FAMILY-half.

    In llama all devices share one copy of the state; in the other runs those of a process do.
    """
    source = ""
    if family == "llama":
        source = "hugging_face"
        run, params = read_run(folder / "llama-one")
        save_hf(folder / source, build(run.model), params)
        shutil.copy(folder / "llama-one" / "tokenizer.json", folder / source)
    whole = [f"sharding.fsdp={4 if family == 'llama' else 2}"]
    of_half = [f"training.run_dir={folder / f'{family}-half'}", *half(folder, family, source=source)]
    train(folder, "two", family, [whole, [*of_half, "sharding.fsdp=2"]], count=2, devices=2)


def train_again(folder: Path, family: str) -> None:
    """Runs that continue llama in new processes.

    In two: `again`, which resumes a copy of it whose newest checkpoints are damaged for the last process, and `branch`.
    In one: `alone`, which resumes a copy of it after step 3.
    """
    for name, steps in {"again": 6, "alone": 3}.items():
        copy_run(folder / family, folder / name, steps=steps)
    again, branch, alone = (
        [f"training.run_dir={folder / name}", "training.sample_tokens=0"] for name in ("again", "branch", "alone")
    )
    branch.append(f"training.branch_from={folder / family}@3")
    in_two = [[*run, "sharding.fsdp=4"] for run in (again, branch)]
    damage = {"6": "unreadable", "5": "array", "4": "position"}
    train(folder, "again", family, in_two, damage=damage, count=2, devices=2)
    train(folder, "alone", family, [alone], count=1, devices=1)


def train_on_four(folder: Path, family: str) -> None:
    """FAMILY-four in four tasks of SLURM, and llama-half-four, which resumes llama-half after step 3."""
    # T5 trains here while it trains on one and two.
    cache = f"training.compilation_cache={folder / f'{family}-four-cache'}"
    commands = [[f"training.run_dir={folder / f'{family}-four'}", "training.sample_tokens=0", cache]]
    if family == "llama":
        copy_run(folder / "llama-half", folder / "llama-half-four", steps=3)
        resumed = half(folder, "llama", source="hugging_face")
        commands.append([f"training.run_dir={folder / 'llama-half-four'}", *resumed, cache])
    train(folder, "four", family, commands, count=4, devices=1, slurm=True)


# A family and its parts, which train in turn. The chains train at the same time.
CHAINS: tuple[tuple[Any, ...], ...] = (
    ("llama", train_on_one, train_on_two, train_again, train_on_four),
    ("t5", train_on_one, train_on_two),
    ("t5", train_on_four),
)
