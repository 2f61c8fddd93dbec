"""Runs that several tests check, trained once for all workers; and the end of processes that a test has started."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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

    def train_family(family: str) -> None:
        for train_on in (train_on_one, train_on_two, train_on_four):
            train_on(folder, family)

    def train_families() -> None:
        write_corpus(folder / "corpus")
        for family in MODELS:
            write(folder, family)
        with ThreadPoolExecutor() as pool:  # both at once
            list(pool.map(train_family, MODELS))

    once(folder, "runs", train_families)
    return folder


def train_on_one(folder: Path, family: str) -> None:
    """FAMILY-one on one device, and FAMILY-half-one, which begins with the parameters of FAMILY-one."""
    runs = {f"{family}-one": [], f"{family}-half-one": half(folder, family)}
    commands = [[f"training.run_dir={folder / name}", *overrides] for name, overrides in runs.items()]
    train(folder, "one", family, commands, count=1, devices=1)


def train_on_two(folder: Path, family: str) -> None:
    """The same runs in two processes with two devices each, as FAMILY and FAMILY-half.

    For llama also a branch, and again, which resumes where the newest checkpoints are damaged for one process. In llama
    and these two all devices share one copy of the state; llama-half and t5 have one for each process.
    """
    of_half = [f"training.run_dir={folder / f'{family}-half'}"]
    if family == "t5":
        train(folder, "two", family, [[*of_half, *half(folder, family)], ["sharding.fsdp=2"]], count=2, devices=2)
        return
    run, params = read_run(folder / "llama-one")
    save_hf(folder / "hugging_face", build(run.model), params)
    shutil.copy(folder / "llama-one" / "tokenizer.json", folder / "hugging_face")
    whole = ["sharding.fsdp=4", "training.sample_tokens=0"]
    commands = [
        ["sharding.fsdp=4"],
        [*whole, f"training.run_dir={folder / 'branch'}", f"training.branch_from={folder / 'llama'}@3"],
        ["copy", f"{folder / 'llama'}", f"{folder / 'again'}"],
        [*whole, f"training.run_dir={folder / 'again'}"],
        ["sharding.fsdp=2", *of_half, *half(folder, "llama", source="hugging_face")],
    ]
    damage = {"6": "unreadable", "5": "array", "4": "position"}
    train(folder, "two", family, commands, count=2, devices=2, damage=damage)


def train_on_four(folder: Path, family: str) -> None:
    """FAMILY-four in four tasks of SLURM, and llama-half-four, which resumes llama-half after step 3."""
    tokenizer = f"data.tokenizer={folder / f'{family}-one' / 'tokenizer.json'}"
    commands = [[f"training.run_dir={folder / f'{family}-four'}", tokenizer, "training.sample_tokens=0"]]
    if family == "llama":
        copy_run(folder / "llama-half", folder / "llama-half-four", steps=3)
        resumed = half(folder, "llama", source="hugging_face")
        commands.append([f"training.run_dir={folder / 'llama-half-four'}", *resumed])
    train(folder, "four", family, commands, count=4, devices=1, slurm=True)
