"""Norms by parameter group: NumPy's, whatever the loss scale, the microbatches and the mesh; a run is not changed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxllm.config import RunConfig
from jaxllm.run.trainer import pretrain
from jaxllm.training.attribution import gradient_groups, norms_row
from jaxllm.training.program import program_of
from tests.conftest import TOLERANCE, write_corpus
from tests.run.test_pretrain import config, final_params
from tests.training.mesh_runs import LLAMA, batch_of, run_config


def groups(tree: Any) -> dict[str, np.ndarray]:
    """Arrays of the groups, by name, in float64."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names, values = [part.key for part in path], np.asarray(leaf, np.float64)
        if "layers" not in names:
            found["/".join(names)] = values
            continue
        at = names.index("layers") + 1
        found |= {"/".join([*names[:at], str(row), *names[at:]]): values[row] for row in range(len(values))}
    return found


def by_numpy(run: RunConfig, state: Any, batch: Any) -> dict[str, float]:
    """Of the mean loss of all rows at once, without a loss scale."""
    program, batch = program_of(run), jax.device_put(batch)

    def mean(params: Any) -> Any:
        sums = program.loss(params, batch, None)
        return sums.loss / sums.weight

    grads = jax.grad(mean)(state.params)
    updates = groups(program.optimizer.update(grads, program.optimizer.init(state.params), state.params)[0])
    row, grads, params = {}, groups(grads), groups(state.params)
    for name, values in grads.items():
        row[f"norms/{name}/grad"] = np.linalg.norm(values)
        row[f"norms/{name}/weight"] = np.linalg.norm(params[name])
        row[f"norms/{name}/update_ratio"] = np.linalg.norm(updates[name]) / np.linalg.norm(params[name])
    return row


def close(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=TOLERANCE["float32_grad"], abs=1e-7), name


@pytest.mark.parametrize("precision", [{}, {"loss_scale": "static", "initial_scale": 2.0**12}])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_norms_are_numpys(accumulation: int, precision: dict[str, Any]) -> None:
    run = run_config(LLAMA, "scan none", accumulation, 1, **precision)
    program = program_of(run)
    state, batch = program.fresh_state(), batch_of(program, 0)
    row = norms_row(state.params, jax.jit(program.norms)(state, batch))
    assert len(row) == 3 * len(gradient_groups(state.params)) and "norms/layers/1/down_proj/kernel/grad" in row
    close(row, by_numpy(run_config(LLAMA, "scan none", 1, 1), state, batch))
    total = np.sqrt(sum(value**2 for name, value in row.items() if name.endswith("/grad")))
    assert total == pytest.approx(float(jax.jit(program.train_step)(state, batch)[1].grad_norm), rel=1e-5)


def test_a_skipped_step_updates_nothing() -> None:
    program = program_of(run_config(LLAMA, "scan none", 1, 1, loss_scale="static", initial_scale=2.0**12))
    state = program.fresh_state()
    batch = batch_of(program, 0)
    batch["weights"][0, 0] = np.inf
    row = norms_row(state.params, jax.jit(program.norms)(state, batch))
    assert {value for name, value in row.items() if name.endswith("update_ratio")} == {0.0}
    assert not all(np.isfinite(value) for name, value in row.items() if name.endswith("grad"))


MESH = """
import jax, numpy as np
from jaxllm.training.program import program_of
from jaxllm.training.sharding import make_mesh, place_rows, state_shardings
from tests.training.mesh_runs import LLAMA, T5, batch_of, run_config
for model in (LLAMA, T5 | {"dropout_rate": 0.0}):
    for fsdp in (1, 2, 4):
        run = run_config(model, "scan none", 2, fsdp)
        one, mesh = program_of(run), make_mesh(fsdp=fsdp)
        state, batch = one.fresh_state(), batch_of(one, 0)
        many = program_of(run, mesh)
        placed = jax.device_put(state, state_shardings(many.abstract_state(), mesh))
        a, b = jax.jit(one.norms)(state, batch), jax.jit(many.norms)(placed, place_rows(batch, mesh))
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
"""


def test_norms_on_a_mesh_are_those_of_one_device() -> None:
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run([sys.executable, "-c", MESH], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_run_records_them_every_k_steps_and_is_not_changed(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    shared: dict[str, Any] = {"steps": 7, "sample_tokens": 0, "save_every": 7, "log_every": 5}
    plain = config(tmp_path / "plain", tmp_path / "corpus", training=shared)
    assert not any(name.startswith("norms/") for row in pretrain(plain).metrics for name in row)
    run = config(tmp_path / "run", tmp_path / "corpus", training={**shared, "norms_every": 3})
    rows = [row for row in pretrain(run).metrics if any(name.startswith("norms/") for name in row)]
    assert [row["step"] for row in rows] == [3, 6]
    names = gradient_groups(program_of(run).abstract_state().params)
    kinds = ("grad", "weight", "update_ratio")
    assert list(rows[0]) == ["step", *(f"norms/{name}/{kind}" for name in names for kind in kinds)]
    assert all(value > 0 for row in rows for value in row.values())
    for a, b in zip(final_params(plain), final_params(run), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_train_step_is_the_same_program_with_and_without_norms(tmp_path: Path) -> None:
    texts = []
    for every in (0, 1):
        program = program_of(config(tmp_path, tmp_path, training={"norms_every": every}))
        arguments = program.abstract_state(), program.abstract_batch()
        texts.append(jax.jit(program.train_step, donate_argnums=0).lower(*arguments).as_text())
    assert texts[0] == texts[1]
