"""Configs of small runs that several processes train, and comparisons of two such runs."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.config.file import dump_config, load_config, parse_config
from jaxllm.run.record import read_metrics
from jaxllm.run.start import read_run
from tests.host.observed import batches_of, first_moments
from tests.training.mesh_runs import apart

# Columns of a step that depend on time.
SPEED = {"tokens_per_second", "tflops", "data_wait"}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "num_kv_heads": 2, "max_length": 64},
    "t5": {"family": "t5", "dropout_rate": 0.1, "layers": "unroll"},
}
# Rows of both hold several documents or examples. Llama's documents are read in four streams.
DATA: dict[str, dict[str, Any]] = {
    "llama": {"objective": "causal", "streams": 4},
    "t5": {"objective": "span_corruption", "example_length": 16},
}
# Llama's run has checkpoints for resumes, branches and damage.
SAVE_EVERY = {"llama": 1, "t5": 6}


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
            | {
                "loss_chunk": 32,
                "log_every": 1,
                "eval_every": 3,
                "save_every": SAVE_EVERY[family],
                "eval_batches": 100,
                "keep": 6,
            }
            # Each family has its own, since both train at the same time and jax does not write a program at once.
            | {"sample_tokens": 2, "sample_prompt": "line", "compilation_cache": str(folder / f"{family}-cache")}
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


def half(folder: Path, family: str, *, source: str = "") -> list[str]:
    """Settings of a float16 run that begins with the parameters of FAMILY-one, or of another folder in `folder`."""
    one = folder / f"{family}-one"
    start = [f"training.init_from={folder / source if source else one}", f"data.tokenizer={one / 'tokenizer.json'}"]
    short = ["training.save_every=3", "training.sample_tokens=0"]
    one_stream = ["data.streams=1"]  # resumes of `llama` have four
    # Roundings of step 1, 4e-5 of a gradient norm, grow with the rate: at 1e-3, T5's norms differ by 7e-4 in step 6.
    rate = {"llama": 1e-3, "t5": 2e-4}[family]
    scaled = ["precision.compute=float16", "precision.initial_scale=1024", f"optimizer.learning_rate={rate}"]
    return [*start, *scaled, *short, *one_stream]


def copy_run(run: Path, target: Path, *, steps: int) -> None:
    """Copies a run with its checkpoints up to a step."""
    shutil.copytree(run, target)
    for path in (target / "checkpoints").iterdir():
        if int(path.name) > steps:
            shutil.rmtree(path)


def once(folder: Path, name: str, make: Callable[[], None]) -> None:
    """Calls `make` in one of the pytest-xdist workers that share the folder; the others wait, and fail if it failed."""
    result = folder / f"{name}.result"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            try:
                make()
                result.touch()
            except BaseException as error:
                result.write_text(f"{type(error).__name__}: {error}")
                raise
    failure = result.read_text()
    assert not failure, failure


def steps_of(run: Path) -> list[int]:
    """Steps in the metrics of a run, which may not have begun."""
    with contextlib.suppress(FileNotFoundError):
        return [row["step"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    return []


def assert_same_record(a: Path, b: Path, *, fingerprints: bool = False) -> None:
    """The same rows and columns, with the same values but for times.

    In float16 the two best logits may be equal.
    """
    rows, others = read_metrics(a / "metrics.jsonl"), read_metrics(b / "metrics.jsonl")
    assert [list(row) for row in rows] == [list(row) for row in others]
    half = any(name.startswith("headroom/") for row in rows for name in row)
    for row, other in zip(rows, others, strict=True):
        for name in row.keys() - SPEED - {"fingerprint"}:
            atol = 0.01 if name.startswith("headroom/") or (half and name.endswith("accuracy")) else 0.0
            np.testing.assert_allclose(row[name], other[name], rtol=1e-4, atol=atol, err_msg=f"{row['step']} {name}")
        if fingerprints:
            assert row.get("fingerprint") == other.get("fingerprint")


def assert_same_run(a: Path, b: Path) -> None:
    """Records and parameters agree, the latter within a step at a small rate; batches are the same to the bit."""
    assert_same_record(a, b)
    atol = min(1e-3, load_config(a / "config.yaml").optimizer.learning_rate)
    for x, y in zip(*(jax.tree.leaves(read_run(path)[1]) for path in (a, b)), strict=True):
        np.testing.assert_allclose(x, y, atol=atol)
    digests = batches_of(b)
    assert batches_of(a) == {step: digests[step] for step in batches_of(a)} and max(batches_of(a)) == 6


def assert_same_first_gradients(a: Path, b: Path) -> None:
    """Each leaf within 2e-6 of its largest value; gradients are clipped, and times a factor that all leaves share."""
    found, expected = first_moments(a), first_moments(b)
    assert found.keys() == expected.keys() and len(found) > 8
    for name, gradient in expected.items():
        assert apart(found[name], gradient) < 2e-6 * np.abs(gradient).max(), name
