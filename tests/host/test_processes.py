"""Runs of several real processes through scripts/pretrain.py equal runs of one, and resume on any number of them.

One launch trains several runs, which several tests check (`conftest`). All have packed rows and accumulation. The first
process compiles for the others (`observed.share_programs`); in test_endings.py each compiles, as for users.

| what equals one process on one device | two processes, two devices each | four processes |
| --- | --- | --- |
| metrics, parameters; T5's bias and dropout | `test_two_processes_equal_one` | `test_four_processes_equal_one` |
| gradients of the first step | the same | the same |
| float16, with a loss scale that grows | `test_float16_from_...` | `test_a_float16_run_...` of Llama |
| batches of a resume | `test_damage_that_...`; in one process `test_a_run_of_two_...` | `test_a_float16_run_...` |

A run of four streams resumes here on as many processes or fewer, and in tests/data/test_streams.py on more readers.
T5 resumes in one process alone (tests/run/test_pretrain_t5.py). Reading a checkpoint on several processes is the same
code for both families; the residual stream of a float16 T5 is in tests/run/test_residual.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jaxllm.run.record import read_metrics
from tests.host.launching import ended_of
from tests.host.observed import batches_of, mesh_of
from tests.host.runs import (
    MODELS,
    SPEED,
    assert_same_first_gradients,
    assert_same_record,
    assert_same_run,
)

# Of four devices of two processes: all share one copy of the state, or those of each process share one.
MESHES = {"llama": {"data": 1, "fsdp": 4, "tensor": 1}, "t5": {"data": 2, "fsdp": 2, "tensor": 1}}

# jax's transport for CPUs prints one sentence from several threads, which break each other's lines.
GLOO_WORDS = set("Gloo Rank is connected to peer ranks Expected number of".split())


@pytest.mark.parametrize("family", MODELS)
def test_two_processes_equal_one(runs: Path, family: str) -> None:
    """Also where the rows of validation do not fill the last batch."""
    assert_same_run(runs / family, runs / f"{family}-one")
    assert_same_first_gradients(runs / family, runs / f"{family}-one")
    assert mesh_of(runs / family) == MESHES[family] and mesh_of(runs / f"{family}-one") is None
    columns = {name for row in read_metrics(runs / family / "metrics.jsonl") for name in row}
    assert ("validation/more/spans_exact" in columns) == (family == "t5") and "validation/loss" in columns
    files = {path.name for path in (runs / f"{family}-one").iterdir()}
    assert {path.name for path in (runs / family).iterdir()} == files


@pytest.mark.parametrize("family", MODELS)
def test_the_first_process_alone_writes_a_log(runs: Path, family: str) -> None:
    first, second = ended_of(runs, "two", family)
    assert "2 processes" in first.stdout and first.stdout.count("step 6 loss") == 2
    assert set(re.findall("[A-Za-z]+", second.stdout)) <= GLOO_WORDS, second.stdout


@pytest.mark.parametrize("family", MODELS)
def test_four_processes_equal_one(runs: Path, family: str) -> None:
    assert_same_run(runs / f"{family}-four", runs / f"{family}-one")
    assert_same_first_gradients(runs / f"{family}-four", runs / f"{family}-one")


@pytest.mark.parametrize("family", MODELS)
def test_float16_from_parameters_elsewhere_which_are_read_by_their_shards(runs: Path, family: str) -> None:
    """Llama's are in a Hugging Face directory, T5's in a run folder."""
    run, one = runs / f"{family}-half", runs / f"{family}-half-one"
    assert_same_run(run, one)
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    assert rows[-1]["loss_scale"] == 4096 and any(name.startswith("headroom/") for name in rows[-1])


def test_damage_that_one_process_sees_is_damage_for_all_and_the_resume_is_bitwise(runs: Path) -> None:
    """Its disk fails, its copy of an array differs, or it reads another position."""
    target, (first, second) = runs / "again", ended_of(runs, "again", "llama")
    assert first.stdout.count("is damaged") == 3 and "from step 3; 3 newer" in first.stdout
    for problem in ("Input/output error", "params/final_norm/weight has fingerprint", "the position in the data"):
        assert problem in first.stdout
    assert "is damaged" not in second.stdout
    assert {path.name for path in (target / "checkpoints.damaged").iterdir()} == {"4", "5", "6"}
    assert list(batches_of(target)) == [4, 5, 6]
    assert_same_record(target, runs / "llama", fingerprints=True)
    assert_same_run(target, runs / "llama")


def test_a_float16_run_of_two_processes_resumes_on_four_tasks_of_slurm(runs: Path) -> None:
    run = runs / "llama-half-four"
    assert "llama-half-four from step 3" in ended_of(runs, "four", "llama")[0].stdout
    assert list(batches_of(run)) == [4, 5, 6]
    assert_same_run(run, runs / "llama-half-one")


def test_a_run_of_two_processes_resumes_in_one(runs: Path) -> None:
    (ended,) = ended_of(runs, "alone", "llama")
    assert "from step 3" in ended.stdout and list(batches_of(runs / "alone")) == [4, 5, 6]
    assert_same_run(runs / "alone", runs / "llama")


def test_a_branch_is_bitwise_on_the_same_layout(runs: Path) -> None:
    assert list(batches_of(runs / "branch")) == [4, 5, 6]
    rows, others = (
        [row for row in read_metrics(runs / name / "metrics.jsonl") if row["step"] > 3] for name in ("branch", "llama")
    )
    assert [row.keys() for row in rows] == [row.keys() for row in others] and rows
    for row, other in zip(rows, others, strict=True):
        assert all(row[name] == other[name] for name in row.keys() - SPEED)
