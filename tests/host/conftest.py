"""Runs that several tests check, trained once for all workers; and the end of processes that a test has started."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
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

    def train_family(family: str) -> None:
        for train_on in (train_on_one, train_on_two, train_on_four):
            train_on(folder, family)

    def train_families() -> None:
        write_corpus(folder / "corpus")
        for family in MODELS:
            write(folder, family)
        with ThreadPoolExecutor() as pool:
            try:
                for future in as_completed([pool.submit(train_family, family) for family in MODELS]):
                    future.result()
            except BaseException:
                for process in list(STARTED):  # of the other family, which then ends too
                    process.kill()
                raise

    once(folder, "runs", train_families)
    return folder


def train_on_one(folder: Path, family: str) -> None:
    """FAMILY-one on one device, and FAMILY-half-one, which begins with the parameters of FAMILY-one."""
    runs = {f"{family}-one": [], f"{family}-half-one": half(folder, family)}
    commands = [[f"training.run_dir={folder / name}", *overrides] for name, overrides in runs.items()]
    train(folder, "one", family, commands, count=1, devices=1)


def train_on_two(folder: Path, family: str) -> None:
    """The same runs in two processes with two devices each, as FAMILY and FAMILY-half.

    Llama has two more runs, in processes of their own: `branch`, and `again`, which resumes a copy of `llama` whose
    newest checkpoints are damaged for the last process. In `llama`, `branch` and `again` all devices share one copy of
    the state; in the other runs those of a process do.
    """
    two: Any = {"count": 2, "devices": 2}
    of_half = [f"training.run_dir={folder / f'{family}-half'}", "sharding.fsdp=2"]
    if family == "t5":
        train(folder, "two", family, [[*of_half, *half(folder, family)], ["sharding.fsdp=2"]], **two)
        return
    run, params = read_run(folder / "llama-one")
    save_hf(folder / "hugging_face", build(run.model), params)
    shutil.copy(folder / "llama-one" / "tokenizer.json", folder / "hugging_face")
    from_elsewhere = [*of_half, *half(folder, family, source="hugging_face")]
    train(folder, "two", family, [["sharding.fsdp=4"], from_elsewhere], **two)
    copy_run(folder / "llama", folder / "again", steps=6)
    whole = ["sharding.fsdp=4", "training.sample_tokens=0"]
    again = [*whole, f"training.run_dir={folder / 'again'}"]
    branch = [*whole, f"training.run_dir={folder / 'branch'}", f"training.branch_from={folder / 'llama'}@3"]
    damage = {"6": "unreadable", "5": "array", "4": "position"}
    train(folder, "again", family, [again, branch], damage=damage, **two)


def train_on_four(folder: Path, family: str) -> None:
    """FAMILY-four in four tasks of SLURM, and llama-half-four, which resumes llama-half after step 3."""
    tokenizer = f"data.tokenizer={folder / f'{family}-one' / 'tokenizer.json'}"
    commands = [[f"training.run_dir={folder / f'{family}-four'}", tokenizer, "training.sample_tokens=0"]]
    if family == "llama":
        copy_run(folder / "llama-half", folder / "llama-half-four", steps=3)
        resumed = half(folder, "llama", source="hugging_face")
        commands.append([f"training.run_dir={folder / 'llama-half-four'}", *resumed])
    train(folder, "four", family, commands, count=4, devices=1, slurm=True)
