"""Runs that several tests check, trained once for all workers; and the end of processes that a test has started."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxllm.interop.hf import save_hf
from jaxllm.models import build
from jaxllm.run.start import read_run
from tests.conftest import write_corpus
from tests.host.launching import STARTED, train_all
from tests.host.runs import MODELS, copy_run, half, once, write


@pytest.fixture(autouse=True)
def none_outlives_its_test() -> Iterator[None]:
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.end()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers share, with a corpus and the configs of both families."""
    workers = tmp_path_factory.getbasetemp()
    folder = (workers.parent if "PYTEST_XDIST_WORKER" in os.environ else workers) / "processes"
    folder.mkdir(exist_ok=True)

    def configure() -> None:
        write_corpus(folder / "corpus")
        for family in MODELS:
            write(folder, family)

    once(folder, "configs", configure)
    return folder


@pytest.fixture(scope="session")
def one(folder: Path) -> Path:
    """Runs on one device: FAMILY-one, and FAMILY-half-one, which begins with the parameters of FAMILY-one."""

    commands = {
        family: [
            [f"{folder}/{family}.yaml", f"training.run_dir={folder / name}", *overrides]
            for name, overrides in {f"{family}-one": [], f"{family}-half-one": half(folder, family)}.items()
        ]
        for family in MODELS
    }
    once(folder, "one", lambda: train_all(folder, "one", commands, count=1, devices=1))
    return folder


@pytest.fixture(scope="session")
def two(one: Path) -> Path:
    """The same runs in two processes with two devices each, as FAMILY and FAMILY-half, and a branch of llama.

    In llama and its branch all devices share one copy of the state; llama-half and t5 have one for each process.
    """
    branch = [f"training.run_dir={one / 'branch'}", f"training.branch_from={one / 'llama'}@3"]
    elsewhere = [f"training.run_dir={one / 'llama-half'}", *half(one, "llama", source="hugging_face")]
    commands = {
        "llama": [
            [f"{one}/llama.yaml", "sharding.fsdp=4"],
            [f"{one}/llama.yaml", "sharding.fsdp=4", *branch, "training.sample_tokens=0"],
            [f"{one}/llama.yaml", "sharding.fsdp=2", *elsewhere],
        ],
        "t5": [
            [f"{one}/t5.yaml", f"training.run_dir={one / 't5-half'}", *half(one, "t5")],
            [f"{one}/t5.yaml", "sharding.fsdp=2"],
        ],
    }

    def train() -> None:
        run, params = read_run(one / "llama-one")
        save_hf(one / "hugging_face", build(run.model), params)
        shutil.copy(one / "llama-one" / "tokenizer.json", one / "hugging_face")
        train_all(one, "two", commands, count=2, devices=2)

    once(one, "two", train)
    return one


@pytest.fixture(scope="session")
def four(two: Path) -> Path:
    """Runs in four tasks of SLURM: FAMILY-four, and FAMILY-half-four, which resumes FAMILY-half after step 3."""
    commands = {}
    for family in MODELS:
        tokenizer = f"data.tokenizer={two / f'{family}-one' / 'tokenizer.json'}"
        run = [f"{two}/{family}.yaml", f"training.run_dir={two / f'{family}-four'}", tokenizer]
        begin = half(two, family, source="hugging_face" if family == "llama" else "")
        commands[family] = [
            [*run, "training.sample_tokens=0"],
            [f"{two}/{family}.yaml", f"training.run_dir={two / f'{family}-half-four'}", *begin],
        ]

    def train() -> None:
        for family in MODELS:
            copy_run(two / f"{family}-half", two / f"{family}-half-four", steps=3)
        train_all(two, "four", commands, count=4, devices=1, slurm=True)

    once(two, "four", train)
    return two
