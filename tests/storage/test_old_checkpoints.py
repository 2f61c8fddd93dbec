"""A float16 checkpoint of an earlier version comes back to the bit, without the leaf that no step reads any more."""

from __future__ import annotations

import logging
import zipfile
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxllm.config.file import load_config
from jaxllm.storage import checkpoint_reading
from jaxllm.storage.checkpoint import CheckpointError, Checkpoints
from jaxllm.storage.checkpoint_reading import with_dropped_leaf, without_dropped_leaf
from jaxllm.training.program import program_of
from jaxllm.training.sharding import with_shardings
from tests.golden.test_runs import FOLDERS, RESULTS


def leaves(tree) -> dict[str, bytes]:
    """Bits by path; keys of dicts and fields of NamedTuples and places in tuples have the same names."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        typed = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found[name] = np.asarray(jax.random.key_data(leaf) if typed else leaf).tobytes()
    return found


@pytest.mark.parametrize("name", ["llama_float16", "t5_float16", "llama_float32"])
def test_a_golden_checkpoint_is_restored_to_the_bit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(FOLDERS / f"{name}.zip") as archive:
        archive.extractall()
    folder = Path("run/checkpoints").absolute()
    want = leaves(ocp.StandardCheckpointer().restore(folder / str(RESULTS["stop"]) / "state"))
    assert (want.pop("opt_state/retried", None) is not None) == ("float16" in name)
    abstract = program_of(load_config("run/config.yaml")).abstract_state()
    checkpoints = Checkpoints(folder, keep=1)
    with caplog.at_level(logging.WARNING):
        restored = checkpoints.restore(with_shardings(abstract, None))
    assert restored is not None and restored.step == RESULTS["stop"] and len(caplog.records) == 1
    assert "has no fingerprint, so it cannot be verified" in caplog.text
    assert jax.tree.structure(restored.state) == jax.tree.structure(abstract)
    assert leaves(restored.state) == want
    checkpoints.save(9, restored.state, restored.data)  # and from here on it is today's
    checkpoints.wait()
    again = checkpoints.restore(with_shardings(abstract, None))
    assert again is not None and again.step == 9 and leaves(again.state) == want
    checkpoints.close()


def test_a_state_of_today_is_left_alone() -> None:
    state = {"params": {"retried": np.ones(2)}, "step": np.int32(0)}
    assert with_dropped_leaf(state, {"opt_state": {"skipped": 0}}) is state
    assert without_dropped_leaf(state) == state


def test_without_it_the_checkpoint_would_count_as_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When this no longer fails, orbax takes the leaf itself and `with_dropped_leaf` can go."""
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(FOLDERS / "llama_float16.zip") as archive:
        archive.extractall()
    monkeypatch.setattr(checkpoint_reading, "with_dropped_leaf", lambda state, found: state)
    checkpoints = Checkpoints(Path("run/checkpoints"), keep=1)
    with pytest.raises(CheckpointError, match="can be read"):
        checkpoints.restore(with_shardings(program_of(load_config("run/config.yaml")).abstract_state(), None))
    checkpoints.close()
