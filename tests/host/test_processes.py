"""Runs of several real processes through scripts/pretrain.py equal runs of one, stop together and end together."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxllm.config.file import dump_config, load_config, parse_config
from jaxllm.host import processes
from jaxllm.interop.hf import save_hf
from jaxllm.models import build
from jaxllm.run.record import read_metrics
from jaxllm.run.start import read_run
from jaxllm.run.trainer import pretrain
from jaxllm.storage.checkpoint_reading import restore_newest
from jaxllm.training.program import program_of
from jaxllm.training.sharding import with_shardings
from tests.conftest import write_corpus
from tests.host.launching import OBSERVED, STARTED, Ended, finish, has_handler, launch, wait_for
from tests.host.observed import Recorder, batches_of, mesh_of
from tests.training.mesh_runs import apart, moments

ENDLESS = ("training.steps=100000", "training.save_every=100000", "training.eval_every=100000")
# Columns of a step that depend on time.
SPEED = {"tokens_per_second", "tflops", "data_wait"}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "num_kv_heads": 2, "max_length": 64},
    "t5": {"family": "t5", "dropout_rate": 0.1},
}
# Rows of both hold several documents or examples. Llama's documents are read in four streams.
DATA: dict[str, dict[str, Any]] = {
    "llama": {"objective": "causal", "streams": 4},
    "t5": {"objective": "span_corruption", "example_length": 16},
}
# Of four devices of two processes: all share one copy of the state, or those of each process share one.
MESHES = {"llama": {"data": 1, "fsdp": 4, "tensor": 1}, "t5": {"data": 2, "fsdp": 2, "tensor": 1}}


def write(folder: Path, family: str, **training: Any) -> Path:
    """The config of a small run in folder/NAME, as folder/FAMILY.yaml."""
    sizes = {"vocab_size": 420, "d_model": 16, "d_ff": 24, "num_layers": 1, "num_heads": 4}
    run = parse_config(
        {
            "model": MODELS[family] | sizes,
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 2},
            "precision": {"compute": "float32", "loss_scale": "dynamic", "growth_interval": 2},
            "data": {"source": "files", "path": str(folder / "corpus"), "sequence_length": 32}
            | {"validation_fraction": 0.2, "validation": sets_of(folder, family)}
            | DATA[family],
            "training": {"run_dir": str(folder / family), "steps": 6, "batch_size": 8, "accumulation": 2}
            | {"loss_chunk": 32, "log_every": 1, "eval_every": 3, "save_every": 1, "eval_batches": 100, "keep": 6}
            | {"sample_tokens": 2, "sample_prompt": "line", "compilation_cache": str(folder / "cache")}
            | training,
        }
    )
    path = folder / f"{family}.yaml"
    path.write_text(dump_config(run))
    return path


def sets_of(folder: Path, family: str) -> dict[str, str]:
    """Two validation sets by name for T5, whose rows do not fill the last batch; Llama has held-out documents."""
    if family != "t5":
        return {}
    for name, count in {"few": 1, "more": 3}.items():
        (folder / name).mkdir(exist_ok=True)
        for i in range(count):
            lines = [f"line {j}: the dog {i} ran to mat {j % 5} and saw {i + j} cats\n" for j in range(20)]
            (folder / name / f"{i}.txt").write_text("".join(lines))
    return {name: str(folder / name) for name in ("few", "more")}


@pytest.fixture(autouse=True)
def none_outlives_its_test() -> Iterator[None]:
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.communicate()


def steps_of(folder: Path) -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        return [row["step"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    return []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, and for each family a run on one device and one of two processes with two devices each."""
    folder = tmp_path_factory.mktemp("processes")
    write_corpus(folder / "corpus")
    for family in MODELS:
        config, one = write(folder, family), folder / f"{family}-one"
        pretrain(load_config(config, [f"training.run_dir={one}"]), on_step=Recorder(one))
        layout = f"sharding.fsdp={MESHES[family]['fsdp']}"
        ended = finish(launch(config, layout, count=2, devices=2, program=OBSERVED))
        assert [each.status for each in ended] == [0, 0], ended
        (folder / f"{family}.txt").write_text(json.dumps(ended))
    return folder


def assert_same_record(a: Path, b: Path, *, fingerprints: bool = False) -> None:
    rows, others = read_metrics(a / "metrics.jsonl"), read_metrics(b / "metrics.jsonl")
    assert [list(row) for row in rows] == [list(row) for row in others]
    for row, other in zip(rows, others, strict=True):
        for name in row.keys() - SPEED - {"fingerprint"}:
            atol = 0.01 if name.startswith("headroom/") else 0.0
            np.testing.assert_allclose(row[name], other[name], rtol=1e-4, atol=atol, err_msg=f"{row['step']} {name}")
        if fingerprints:
            assert row.get("fingerprint") == other.get("fingerprint")


def assert_same_run(a: Path, b: Path) -> None:
    """Records and parameters agree, and batches are the same to the bit."""
    assert_same_record(a, b)
    for x, y in zip(*(jax.tree.leaves(read_run(path)[1]) for path in (a, b)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-3)
    digests = batches_of(b)
    assert batches_of(a) == {step: digests[step] for step in batches_of(a)} and max(batches_of(a)) == 6


def first_gradients(run: Path) -> dict[str, np.ndarray]:
    """Of the first step, clipped, times a factor that is the same for all."""
    state = with_shardings(program_of(load_config(run / "config.yaml")).abstract_state(), None)
    found, _ = restore_newest(run / "checkpoints", [1], state)
    assert found is not None
    return moments(found.state.opt_state)


def assert_same_first_gradients(a: Path, b: Path) -> None:
    found, expected = first_gradients(a), first_gradients(b)
    assert found.keys() == expected.keys() and len(found) > 8
    for name, gradient in expected.items():
        assert apart(found[name], gradient) < 2e-6 * np.abs(gradient).max(), name


@pytest.mark.parametrize("family", MODELS)
def test_two_processes_equal_one(folder: Path, family: str) -> None:
    """Also where the rows of validation do not fill the last batch."""
    assert_same_run(folder / family, folder / f"{family}-one")
    assert_same_first_gradients(folder / family, folder / f"{family}-one")
    assert mesh_of(folder / family) == MESHES[family] and mesh_of(folder / f"{family}-one") is None
    columns = {name for row in read_metrics(folder / family / "metrics.jsonl") for name in row}
    assert ("validation/more/spans_exact" in columns) == (family == "t5") and "validation/loss" in columns
    first, second = (Ended(*each) for each in json.loads((folder / f"{family}.txt").read_text()))
    assert "2 processes" in first.stdout and "step 6 " in first.stdout
    assert not [line for line in second.stdout.splitlines() if "[Gloo]" not in line]
    files = {path.name for path in (folder / f"{family}-one").iterdir()}
    assert {path.name for path in (folder / family).iterdir()} == files


def test_t5_in_four_processes_equals_one(folder: Path) -> None:
    target = folder / "t5-four"
    ended = finish(launch(folder / "t5.yaml", f"training.run_dir={target}", count=4, devices=1, program=OBSERVED))
    assert [each.status for each in ended] == [0] * 4, ended
    assert_same_run(target, folder / "t5-one")
    assert_same_first_gradients(target, folder / "t5-one")


def copy_to(folder: Path, name: str, *, steps: int = 6) -> Path:
    """The run of two processes, with its checkpoints up to a step."""
    target = folder / name
    shutil.copytree(folder / "llama", target)
    for path in (target / "checkpoints").iterdir():
        if int(path.name) > steps:
            shutil.rmtree(path)
    return target


def test_damage_that_one_process_sees_is_damage_for_all_and_the_resume_is_bitwise(folder: Path) -> None:
    """Its disk fails, its copy of an array differs, or it reads another position."""
    target, damage = copy_to(folder, "again"), {"6": "unreadable", "5": "array", "4": "position"}
    overrides = (f"training.run_dir={target}", "sharding.fsdp=4")
    ended = finish(launch(folder / "llama.yaml", *overrides, count=2, devices=2, program=OBSERVED, damage=damage))
    assert [each.status for each in ended] == [0, 0], ended
    assert ended[0].stdout.count("is damaged") == 3 and "from step 3; 3 newer" in ended[0].stdout
    for problem in ("Input/output error", "params/final_norm/weight has fingerprint", "the position in the data"):
        assert problem in ended[0].stdout
    assert "is damaged" not in ended[1].stdout
    assert {path.name for path in (target / "checkpoints.damaged").iterdir()} == damage.keys()
    assert_same_record(target, folder / "llama", fingerprints=True)
    assert_same_run(target, folder / "llama")


def test_a_run_of_two_processes_resumes_on_four_tasks_of_slurm(folder: Path) -> None:
    target = copy_to(folder, "slurm", steps=3)
    overrides, options = f"training.run_dir={target}", {"program": OBSERVED, "slurm": True}
    ended = finish(launch(folder / "llama.yaml", overrides, count=4, devices=1, **options))
    assert [each.status for each in ended] == [0] * 4, ended
    assert "from step 3" in ended[0].stdout and list(batches_of(target)) == [4, 5, 6]
    assert_same_run(target, folder / "llama")


def test_a_run_of_two_processes_resumes_in_one(folder: Path) -> None:
    target = copy_to(folder, "alone", steps=3)
    config = load_config(folder / "llama.yaml", [f"training.run_dir={target}"])
    assert pretrain(config, on_step=Recorder(target)).resumed_from == 3 and list(batches_of(target)) == [4, 5, 6]
    assert_same_run(target, folder / "llama")


@pytest.mark.parametrize("kind", ["run", "hugging_face"])
def test_float16_from_parameters_elsewhere_which_are_read_by_their_shards(folder: Path, kind: str) -> None:
    source = folder / "llama"
    if kind == "hugging_face":
        run, params = read_run(source)
        save_hf(folder / kind, build(run.model), params)
        shutil.copy(source / "tokenizer.json", folder / kind)
        source = folder / kind
    target, one = folder / f"from-{kind}", folder / "from-one"
    overrides = [f"training.init_from={source}", f"data.tokenizer={folder / 'llama' / 'tokenizer.json'}"]
    overrides += ["precision.compute=float16", "precision.initial_scale=1024"]
    ended = finish(launch(folder / "llama.yaml", f"training.run_dir={target}", *overrides, count=2, devices=2))
    assert [each.status for each in ended] == [0, 0], ended
    if not one.exists():
        pretrain(load_config(folder / "llama.yaml", [f"training.run_dir={one}", *overrides]))
    assert_same_record(target, one)
    rows = [row for row in read_metrics(target / "metrics.jsonl") if "loss" in row]
    assert rows[-1]["loss_scale"] == 4096 and any(name.startswith("headroom/") for name in rows[-1])


def test_sigterm_to_one_saves_the_same_step_and_sigkill_ends_the_other(folder: Path) -> None:
    """The second signal comes before the run has resumed: jax would then wait for its step 1."""
    target = folder / "endless"
    overrides = (f"training.run_dir={target}", *ENDLESS)
    processes = launch(folder / "llama.yaml", *overrides, count=2, devices=2)
    wait_for(lambda: len(steps_of(target)) > 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    ended = finish(processes)
    assert [each.status for each in ended] == [75, 75], ended
    saved = [int(path.name) for path in (target / "checkpoints").iterdir()]
    assert saved == [steps_of(target)[-1]] and f"stopped at step {saved[0]}" in ended[0].stdout

    processes = launch(folder / "llama.yaml", *overrides, count=2, devices=2)
    wait_for(lambda: has_handler(processes[1]), processes)
    processes[1].send_signal(signal.SIGTERM)
    assert [each.status for each in finish(processes)] == [75, 75]
    assert (target / "checkpoints" / str(saved[0] + 1)).is_dir()

    processes = launch(folder / "llama.yaml", *overrides, count=2, devices=2)
    wait_for(lambda: steps_of(target)[-1] > saved[0] + 2, processes)
    processes[1].kill()
    killed = time.monotonic()
    ended = finish(processes)
    assert ended[0].status == 1 and time.monotonic() - killed < 60, ended
    assert "the same command resumes" in ended[0].stdout and "Traceback" not in ended[0].stdout


@pytest.mark.parametrize("cluster", [{"JOB_COMPLETION_INDEX": "3"}, {"SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "2"}])
def test_a_process_may_be_a_run_of_its_own(monkeypatch: pytest.MonkeyPatch, cluster: dict[str, str]) -> None:
    """Such as the pods of an Indexed Job that are a sweep."""

    def connect(*args: object, **options: object) -> None:
        raise ValueError("connected")

    monkeypatch.setattr(jax.distributed, "initialize", connect)
    for name, value in cluster.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="connected"):
        processes.start()
    monkeypatch.setenv("JAXLLM_PROCESSES", "1")
    processes.start()
    assert not processes.several()


def test_wall_time_and_sigusr1_stop_all_at_the_same_step(folder: Path) -> None:
    target = folder / "timed"
    overrides = (f"training.run_dir={target}", *ENDLESS)
    ended = finish(launch(folder / "llama.yaml", *overrides, "training.stop_after=1s", count=2, devices=2))
    assert [each.status for each in ended] == [75, 75], ended
    (saved,) = (int(path.name) for path in (target / "checkpoints").iterdir())
    assert saved == steps_of(target)[-1] and "training.stop_after has passed" in ended[0].stdout

    processes = launch(folder / "llama.yaml", *overrides, "training.save_every_minutes=1e-4", count=2, devices=2)
    wait_for(lambda: steps_of(target)[-1] > saved + 17, processes)
    for process in processes:  # as SLURM does
        process.send_signal(signal.SIGUSR1)
    ended = finish(processes)
    assert [each.status for each in ended] == [75, 75], ended
    *by_time, last = sorted(int(path.name) for path in (target / "checkpoints").iterdir())
    assert last == steps_of(target)[-1] and any(step % 8 == 0 for step in by_time)
    assert all(step % 8 == 0 for step in by_time if step != saved)


def test_a_branch_is_bitwise_on_the_same_layout(folder: Path) -> None:
    target, parent = folder / "branch", folder / "llama"
    overrides = (f"training.run_dir={target}", f"training.branch_from={parent}@3")
    ended = finish(launch(folder / "llama.yaml", *overrides, count=2, devices=2))
    assert [each.status for each in ended] == [0, 0], ended
    rows, others = (
        [row for row in read_metrics(each / "metrics.jsonl") if row["step"] > 3] for each in (target, parent)
    )
    assert [row.keys() for row in rows] == [row.keys() for row in others]
    for row, other in zip(rows, others, strict=True):
        assert all(row[name] == other[name] for name in row.keys() - SPEED)


# By a setting that only one process has, or none: its disk is full.
FAULTS = {
    "training.sed=1": "did you mean 'training.seed'",
    "training.seed=1": "have a different config",
    "": "cannot write a checkpoint: ",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_of_one_process_ends_all_with_one_message(folder: Path, fault: str) -> None:
    target, message = folder / f"fault{fault}", FAULTS[fault]
    last = [fault] if fault else []
    overrides = (f"training.run_dir={target}", "training.save_every=1")
    processes = launch(folder / "llama.yaml", *overrides, count=2, devices=2, last=last)
    if not fault:
        wait_for(lambda: (target / "config.yaml").exists(), processes)
        resource.prlimit(processes[1].pid, resource.RLIMIT_FSIZE, (100, 100))
        wait_for(lambda: len(steps_of(target)) > 0, processes)
    before = time.monotonic()
    ended = finish(processes)
    assert not fault or time.monotonic() - before < 60
    assert all(each.status in (1, 2) for each in ended), ended
    said = [line for each in ended for line in (each.stdout + each.stderr).splitlines() if message in line]
    assert len(said) == 1 and all("Traceback" not in each.stdout for each in ended), ended


def test_a_task_for_each_of_the_gpus_of_a_node_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes, "gather", lambda text: [text, text])
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    processes.check_devices()  # a run on CPUs, whatever the node has
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match=r"2 of its 8 GPUs; start one for each \(SLURM: --ntasks-per-node=8"):
        processes.check_devices()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    processes.check_devices()
