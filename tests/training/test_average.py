"""The average of the parameters: a float64 reference, skipped steps, meshes, memory, evaluation and loading."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxllm
from jaxllm.config import RunConfig
from jaxllm.run.start import read_run
from jaxllm.run.trainer import pretrain
from jaxllm.training.fit import estimate_fit
from jaxllm.training.program import CustomParts, program_of
from tests.conftest import write_corpus
from tests.run.test_pretrain import config
from tests.training.mesh_runs import HALF, LLAMA, batch_of, run_config

DECAY = 0.9


def averaged(run: RunConfig, decay: float | None = DECAY) -> RunConfig:
    sections = {"optimizer": jaxllm.OptimizerConfig(learning_rate=1e-2, ema=decay)}
    return RunConfig(model=run.model, precision=run.precision, data=run.data, training=run.training, **sections)


def assert_equal(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("precision", [{}, {"loss_scale": "dynamic"}])
@pytest.mark.parametrize("custom", [False, True])
def test_it_is_the_float64_average_of_the_steps_that_were_not_skipped(custom: bool, precision: dict[str, Any]) -> None:
    run = averaged(run_config(LLAMA, "scan none", 1, 1, **precision))
    program = program_of(run, custom=CustomParts(optimizer=optax.sgd(0.1)) if custom else CustomParts())
    plain = program_of(averaged(run, None), custom=CustomParts(optimizer=optax.sgd(0.1)) if custom else CustomParts())
    state, reference = program.fresh_state(), plain.fresh_state()
    assert_equal(state.evaluated, state.params)  # before the first step
    assert reference.evaluated is reference.params
    step, plain_step = jax.jit(program.train_step, donate_argnums=0), jax.jit(plain.train_step)
    seen: list[Any] = []
    for number in range(6):
        batch = batch_of(program, number)
        if number in (0, 3) and precision:
            batch["weights"][0, 0] = np.inf  # an overflow
        before = [np.array(leaf) for leaf in jax.tree.leaves(state.evaluated)]
        state, metrics = step(state, batch)
        reference, _ = plain_step(reference, batch)
        if number in (0, 3) and precision:
            assert metrics.skipped > 0
            assert_equal(before, state.evaluated)
            continue
        seen.append([np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(state.params)])
        weights = DECAY ** np.arange(len(seen))[::-1]
        for i, leaf in enumerate(jax.tree.leaves(state.evaluated)):
            expected = sum(weight * leaves[i] for weight, leaves in zip(weights, seen, strict=True)) / weights.sum()
            assert leaf.dtype == jnp.float32
            np.testing.assert_allclose(leaf, expected, rtol=2e-6, atol=2e-7)
    for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(reference.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_without_it_the_program_and_the_state_are_as_before() -> None:
    run = run_config(LLAMA, "scan none", 1, 1, **HALF)
    texts = set()
    for decay in (None, 0):
        program = program_of(averaged(run, decay))
        assert len(jax.tree.leaves(program.abstract_state())) == len(jax.tree.leaves(program_of(run).abstract_state()))
        texts.add(jax.jit(program.train_step).lower(program.abstract_state(), program.abstract_batch()).as_text())
    assert len(texts) == 1


def test_the_estimate_of_memory_counts_it() -> None:
    run = run_config(LLAMA, "scan none", 1, 1)
    size = sum(leaf.size * 4 for leaf in jax.tree.leaves(program_of(run).abstract_state().params))
    plain, with_it = (estimate_fit(program_of(averaged(run, decay))).moments for decay in (None, DECAY))
    assert size <= with_it - plain <= size + 16


ROOT = Path(__file__).parent.parent.parent

MESH = """
import jax, numpy as np
from jaxllm.training.program import program_of
from jaxllm.training.sharding import make_mesh, place_rows, state_shardings
from tests.training.mesh_runs import LLAMA, batch_of, run_config
from tests.training.test_average import averaged
for fsdp in (1, 4):
    run = averaged(run_config(LLAMA, "scan none", 2, fsdp, loss_scale="dynamic"))
    one, mesh = program_of(run), make_mesh(fsdp=fsdp)
    many = program_of(run, mesh)
    layout = state_shardings(many.abstract_state(), mesh)
    state = one.fresh_state()
    spread = jax.device_put(state, layout)
    step, wide = jax.jit(one.train_step), jax.jit(many.train_step, out_shardings=(layout, None))
    for number in range(3):
        batch = batch_of(one, number)
        state, _ = step(state, batch)
        spread, _ = wide(spread, place_rows(batch, mesh))
    for a, b, c in zip(*(jax.tree.leaves(x) for x in (state.evaluated, spread.evaluated, spread.params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
        assert b.sharding == c.sharding
"""


def test_on_a_mesh_it_has_the_layout_of_the_parameters() -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    places = os.pathsep.join([str(ROOT), str(ROOT / "scripts")])
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": places}
    done = subprocess.run([sys.executable, "-c", MESH], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("precision", [{}, {"compute": "float16", "loss_scale": "dynamic"}])
def test_a_run_evaluates_samples_and_loads_the_average_and_resumes_with_it(
    precision: dict[str, Any], tmp_path: Path
) -> None:
    write_corpus(tmp_path / "corpus")
    shared: dict[str, Any] = {"optimizer": {"ema": DECAY, "learning_rate": 1e-2}, "precision": precision}
    run = config(tmp_path / "run", tmp_path / "corpus", **shared)
    evaluated: dict[int, Any] = {}

    def keep(step: int, metrics: dict[str, float], params: Any) -> None:
        evaluated[step] = (metrics["loss"], jax.device_get(params))

    pretrain(run, stop_at=5, on_evaluate=keep)
    summary = pretrain(run, on_evaluate=keep)
    loss, expected = evaluated[8]
    assert summary.validation["loss"] == loss
    _, average = jaxllm.load_run(tmp_path / "run")
    _, raw = jaxllm.load_run(tmp_path / "run", average=False)
    assert_equal(average, expected)
    assert any(bool((x != y).any()) for x, y in zip(jax.tree.leaves(average), jax.tree.leaves(raw), strict=True))

    whole = config(tmp_path / "whole", tmp_path / "corpus", **shared)
    pretrain(whole)
    for chosen in (True, False):
        assert_equal(read_run(tmp_path / "whole", average=chosen)[1], average if chosen else raw)

    start = {"init_from": str(tmp_path / "run"), "sample_tokens": 0, "eval_every": 1, "steps": 1}
    data = {"tokenizer": str(tmp_path / "run" / "tokenizer.json")}
    started: list[Any] = []
    still = {"learning_rate": 1e-30, "ema": DECAY}
    again = config(tmp_path / "again", tmp_path / "corpus", training=start, data=data, optimizer=still)
    pretrain(again, on_evaluate=lambda step, metrics, params: started.append(jax.device_get(params)))
    for x, y in zip(jax.tree.leaves(started[0]), jax.tree.leaves(average), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)


def test_an_average_in_an_optimizer_of_ones_own_is_not_taken_for_it(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    run = config(tmp_path / "run", tmp_path / "corpus", training={"steps": 2, "sample_tokens": 0})
    pretrain(run, optimizer=optax.chain(optax.ema(0.9), optax.sgd(0.1)))
    average, raw = (jaxllm.load_run(tmp_path / "run", average=chosen)[1] for chosen in (True, False))
    assert_equal(average, raw)
