"""A damaged checkpoint is noticed: what is restored is what was saved, of this checkpoint or of the one before.

JAXLLM_FLIPS=500 tries as many random bit flips instead of the few that a run of the tests makes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxllm.config import LlamaConfig, PrecisionConfig, RunConfig, T5Config
from jaxllm.config.run import DataConfig, TrainingConfig
from jaxllm.models import abstract_params
from jaxllm.storage.checkpoint import CheckpointError, Checkpoints, load_params, read_leaves
from jaxllm.training.fingerprint import named_fingerprints
from jaxllm.training.program import Program, program_of
from jaxllm.training.sharding import make_mesh, with_shardings

ROOT = Path(__file__).parent.parent.parent
FLIPS = int(os.environ.get("JAXLLM_FLIPS", "24"))
SIZES = {"vocab_size": 64, "d_model": 8, "d_ff": 8, "num_heads": 2, "head_dim": 4}
POSITION = {"iterator": {"next_index": 3}, "tokenizer": "abc"}


def llama() -> RunConfig:
    return RunConfig(model=LlamaConfig(**SIZES, num_layers=2))


def t5() -> RunConfig:
    model = T5Config(**SIZES, num_layers=1, num_decoder_layers=1)
    precision = PrecisionConfig(compute="float16", loss_scale="dynamic")
    data = DataConfig(objective="span_corruption", sequence_length=32)
    return RunConfig(model=model, data=data, precision=precision, training=TrainingConfig(sample_tokens=0))


@pytest.fixture(scope="module", params=[llama, t5], ids=["llama", "t5"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Program, list[Any]]:
    """A folder with checkpoints of steps 1 and 2, and their states."""
    program = program_of(request.param())
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    first = jax.jit(program.fresh_state)()
    states = [first, jax.tree.map(lambda x: x if x.dtype == first.key.dtype else x * 2 + 1, first)]
    checkpoints = Checkpoints(folder, keep=2)
    for step, state in enumerate(states, start=1):
        checkpoints.save(step, state, {**POSITION, "step": step})
        checkpoints.wait()
    checkpoints.close()
    return folder, program, states


def restored(folder: Path, program: Program) -> tuple[int, Any, dict[str, Any]]:
    checkpoints = Checkpoints(folder, keep=2)
    try:
        found = checkpoints.restore(with_shardings(program.abstract_state(), make_mesh()))  # as `find_start`
        assert found is not None
        return found.step, found.state, found.data
    finally:
        checkpoints.close()


def assert_noticed(copy: Path, program: Program, states: list[Any]) -> int:
    """What either reader returns is exactly what was saved at some step; returns that of a resume."""
    params = named_fingerprints(load_params(copy, abstract_params(program.model)))
    assert params in [named_fingerprints(state.params) for state in states]
    assert (copy / "2").exists() or not (copy.parent / "checkpoints.damaged").exists()  # a reader renames nothing
    step, state, position = restored(copy, program)
    assert named_fingerprints(state) == named_fingerprints(states[step - 1])
    assert position == {**POSITION, "step": step}
    return step


RESTORE = """
import gc, sys
from pathlib import Path
from tests.storage.test_damage import llama, restored
from jaxllm.training.program import program_of

print("restored", restored(Path(sys.argv[1]), program_of(llama()))[0])
gc.collect()
"""


def test_damage_of_all_leaves_prints_no_traceback(tmp_path: Path) -> None:
    """orbax raises at the first leaf, while tensorstore still reads the others."""
    program, folder = program_of(llama()), tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, keep=2)
    for step in (1, 2):
        checkpoints.save(step, jax.jit(program.fresh_state)(), POSITION)
        checkpoints.wait()
    checkpoints.close()
    for file in (folder / "2").rglob("d/*"):
        truncated(file)
    command = [sys.executable, "-c", RESTORE, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "restored 1\n" and "checkpoint 2" in done.stderr
    assert "Traceback" not in done.stderr and "ignored" not in done.stderr


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def zeroed(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 4096] = bytes(len(data[len(data) // 3 : len(data) // 3 + 4096]))
    file.write_bytes(data)


def flipped(file: Path, *, place: float = 0.6, bit: int = 6) -> None:
    data = bytearray(file.read_bytes())
    if data:
        data[int(place * len(data))] ^= 1 << bit
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [truncated, zeroed, flipped, Path.unlink], ids=lambda each: each.__name__)
def test_damage_to_any_file_is_noticed(
    saved: tuple[Path, Program, list[Any]], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder, program, states = saved
    fallbacks = 0
    for file in sorted(each for each in (folder / "2").rglob("*") if each.is_file()):
        copy = tmp_path / "run" / "checkpoints"
        shutil.copytree(folder, copy)
        damage(copy / file.relative_to(folder))
        fallbacks += assert_noticed(copy, program, states) == 1
        shutil.rmtree(tmp_path / "run")
    assert fallbacks


def test_a_flipped_bit_is_noticed(saved: tuple[Path, Program, list[Any]], tmp_path: Path) -> None:
    """Bits of all files, each byte equally likely."""
    folder, program, states = saved
    files = sorted(each for each in (folder / "2").rglob("*") if each.is_file() and each.stat().st_size)
    sizes = np.array([file.stat().st_size for file in files])
    rng = np.random.default_rng(0)
    fallbacks = 0
    for index in rng.choice(len(files), FLIPS, p=sizes / sizes.sum()):
        copy = tmp_path / "run" / "checkpoints"
        shutil.copytree(folder, copy)
        flipped(copy / files[index].relative_to(folder), place=rng.random(), bit=int(rng.integers(8)))
        damage = read_leaves(copy, 2, arrays=True)[1]
        step = assert_noticed(copy, program, states)
        assert bool(damage) == (step == 1), damage  # the verdict of scripts/verify_run.py is what a resume does
        fallbacks += step == 1
        shutil.rmtree(tmp_path / "run")
    assert fallbacks


def test_other_bits_under_whole_files_are_noticed(saved: tuple[Path, Program, list[Any]], tmp_path: Path) -> None:
    """A state that changed while it was being saved, or a cast: no checksum of files could tell."""
    folder, program, _ = saved
    copy = tmp_path / "checkpoints"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "2" / "data")
    shutil.copytree(folder / "1" / "data", copy / "2" / "data")
    assert restored(copy, program)[0] == 1


def test_an_error_that_begins_with_an_empty_line_is_damage(
    saved: tuple[Path, Program, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """orbax has such messages; one without a first line must not count as a checkpoint that could be read."""
    folder, program, _ = saved

    def fails(restored: Any, record: dict[str, Any]) -> bool:
        if record["position"]["step"] == 2:
            raise ValueError("\nthe tree does not match")
        return True

    copy = tmp_path / "checkpoints"
    shutil.copytree(folder, copy)
    monkeypatch.setattr("jaxllm.storage.checkpoint_reading.verify_tree", fails)
    assert restored(copy, program)[0] == 1


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(
    saved: tuple[Path, Program, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, program, _ = saved
    refusal = PermissionError(13, "Permission denied", str(folder / "2" / "state" / "_METADATA"))
    monkeypatch.setattr("jaxllm.storage.checkpoint_reading.refused", lambda folder: refusal)  # root may read everything
    copy = tmp_path / "checkpoints"
    shutil.copytree(folder, copy)
    (copy / "2" / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*_METADATA: Permission denied; make it readable"):
        load_params(copy, abstract_params(program.model))
    assert not (tmp_path / "checkpoints.damaged").exists()
