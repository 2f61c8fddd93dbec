"""A run on several devices equals the run on one; one process with four host devices checks all invariants."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from jaxllm.config import LlamaConfig, RunConfig
from jaxllm.config.file import dump_config, parse_config
from jaxllm.models import abstract_params
from jaxllm.run.start import read_run
from jaxllm.run.trainer import pretrain
from jaxllm.training import sharding
from jaxllm.training.fit import estimate_fit
from jaxllm.training.program import program_of
from jaxllm.training.sharding import AXES, check_rows, device_bytes, make_mesh

# Trains to step 4, copies the folder for the parent, continues to the end; then one step in which one device overflows.
RUN = """
import json, re, shutil, sys
import jax, jax.numpy as jnp, numpy as np, optax
from jaxllm.config.file import load_config
from jaxllm.ops.losses import LossSums
from jaxllm.training.sharding import make_mesh, place_rows, state_shardings
from jaxllm.run.compiled import CompiledOnce
from jaxllm.training.precision import dynamic_loss_scale
from jaxllm.training.train_step import init_train_state, make_train_step
from jaxllm.run.trainer import pretrain

run, copy = load_config(sys.argv[1]), sys.argv[2]
compiled, original = {}, CompiledOnce.prepare

def keep(self, *args):
    executable = original(self, *args)
    compiled.setdefault(self._name, (executable, args))
    return executable

CompiledOnce.prepare = keep
pretrain(run, stop_at=4)
shutil.copytree(run.training.run_dir, copy)
resumed = pretrain(run).resumed_from

executable, (state, batch) = compiled["train step"]
held = sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
           for x in jax.tree.leaves((state.params, state.opt_state)))
moved = re.findall(r"= (.*?) (all-\\w+|reduce-scatter|collective-\\w+)(?:-start)?\\(", executable.as_text())
largest = max(int(np.prod([int(n) for n in shape.split(",") if n])) for kind, _ in moved
              for shape in re.findall(r"\\w+\\[([\\d,]*)\\]", kind))

def loss(params, rows, key):
    total = jnp.sum(rows["weights"] * (rows["x"] @ params["kernel"]).sum(-1))
    return LossSums(total, total, jnp.sum(rows["weights"]), total)

mesh, rule = make_mesh(), dynamic_loss_scale(optax.adam(0.1), initial_scale=8.0)
step = jax.jit(make_train_step(loss, rule, accumulation=1, dtype="float32", mesh=mesh))
start = init_train_state({"kernel": jnp.ones((4, 2))}, rule, jax.random.key(0))
start = jax.device_put(start, state_shardings(start, mesh))
x = np.ones((4, 4), np.float32)
x[2, 0] = np.inf  # on the third device alone
after, _ = step(start, place_rows({"x": x, "weights": np.ones((4,), np.float32)}, mesh))
scales = {float(shard.data) for shard in after.opt_state.scale.addressable_shards}
untouched = bool((after.params["kernel"] == 1).all()) and int(after.opt_state.inner[0].count) == 0
print(json.dumps({
    "resumed": resumed, "held": int(held), "moved": sorted({name for _, name in moved}), "largest": largest,
    "rows_of_a_device": [x.addressable_shards[0].data.shape[0] for x in jax.tree.leaves(batch)],
    "scales": sorted(scales), "skipped": int(after.opt_state.skipped), "untouched": untouched,
}))
"""


def config(folder: Path, corpus: Path, name: str) -> RunConfig:
    return parse_config(
        {
            "model": {"family": "t5", "vocab_size": 420, "d_model": 16, "d_ff": 24, "num_layers": 1, "num_heads": 2},
            "optimizer": {"learning_rate": 1e-3},
            "precision": {"loss_scale": "dynamic", "growth_interval": 2},
            "data": {"source": "files", "path": str(corpus), "objective": "span_corruption", "sequence_length": 64}
            | {"validation_fraction": 0.2},
            "training": {
                "run_dir": str(folder / name),
                "steps": 6,
                "batch_size": 8,
                "accumulation": 2,
                "loss_chunk": 32,
                "log_every": 1,
                "eval_every": 6,
                "save_every": 4,
                "eval_batches": 1,
                "sample_tokens": 2,
                "compilation_cache": str(folder / "cache"),
            },
        }
    )


def record(run: RunConfig, *names: str) -> np.ndarray:
    lines = (Path(run.training.run_dir) / "metrics.jsonl").read_text().splitlines()
    return np.array([[row[name] for name in names] for row in map(json.loads, lines) if names[0] in row])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, RunConfig, RunConfig, dict[str, Any]]:
    """A run on one device, one on four, one moved from four to one after step 4, and what the four reported."""
    folder = tmp_path_factory.mktemp("sharding")
    (folder / "corpus").mkdir()
    for i in range(20):
        text = "".join(f"line {j}: the cat {i} sat on mat {j % 7}\n" for j in range(20))
        (folder / "corpus" / f"{i}.txt").write_text(text)
    one, four, moved = (config(folder, folder / "corpus", name) for name in ("one", "four", "moved"))
    (folder / "four.yaml").write_text(dump_config(four))
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    command = [sys.executable, "-c", RUN, str(folder / "four.yaml"), moved.training.run_dir]
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    pretrain(one)
    assert pretrain(moved).resumed_from == 4
    return one, four, moved, json.loads(done.stdout.strip().splitlines()[-1])


def test_sharded_equals_single_also_after_moving(runs: tuple[RunConfig, RunConfig, RunConfig, dict]) -> None:
    one, *others, report = runs
    assert report["resumed"] == 4
    names = ("loss", "grad_norm", "accuracy", "loss_scale")
    expected, (_, params) = record(one, *names), read_run(one.training.run_dir)
    assert expected.shape == (6, 4) and expected[-1, 3] > expected[0, 3]
    for run in others:
        np.testing.assert_allclose(record(run, *names), expected, rtol=1e-4)
        validation = ("validation/loss", "validation/spans_exact")
        np.testing.assert_allclose(record(run, *validation), record(one, *validation), rtol=1e-4)
        for a, b in zip(jax.tree.leaves(read_run(run.training.run_dir)[1]), jax.tree.leaves(params), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_device_holds_and_sends_its_share(runs: tuple[RunConfig, RunConfig, RunConfig, dict]) -> None:
    four, report = runs[1], runs[3]
    program = program_of(four)
    moments = estimate_fit(program, AbstractMesh((1, 4, 1), AXES)).moments
    assert report["held"] == device_bytes(abstract_params(program.model), 4) + moments
    assert set(report["rows_of_a_device"]) == {2}
    # Whole weights are collected and sums of gradients handed out; activations (8 x 64 x 16) stay where they are.
    assert {"all-gather", "all-reduce"} <= set(report["moved"]) <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert report["largest"] <= four.model.vocab_size * four.model.d_model


def test_an_overflow_on_one_device_is_one_for_all(runs: tuple[RunConfig, RunConfig, RunConfig, dict]) -> None:
    report = runs[3]
    assert (report["scales"], report["skipped"], report["untouched"]) == ([4.0], 1, True)


def test_the_loop_that_the_guide_shows_runs(tiny: LlamaConfig) -> None:
    """On one device here; the invariants of several are above."""
    guide = (Path(__file__).parent.parent.parent / "docs" / "cluster.md").read_text(encoding="utf-8")
    (loop,) = re.findall(r"```python\n(.+?)```", guide, flags=re.S)
    rows = jnp.arange(32).reshape(4, 8)
    batch = {"tokens": rows, "targets": rows, "weights": jnp.ones((4, 8))}
    config = RunConfig(model=dataclasses.replace(tiny, max_length=256))
    names = {**vars(sharding), "program_of": program_of, "config": config, "batches": [batch, batch]}
    exec(loop, names)
    assert int(names["state"].step) == 2 and np.isfinite(names["metrics"].loss)
    assert names["params"]["embed"].sharding.device_set == {jax.devices()[0]}


def test_rows_that_cannot_be_shared_are_refused() -> None:
    check_rows(batch_size=16, accumulation=2, devices=4)
    with pytest.raises(ValueError, match=r"batch_size 10 in 2 .* by 4 devices; .* multiple of 8, e.g. .*batch_size=16"):
        check_rows(batch_size=10, accumulation=2, devices=4)
    assert make_mesh(jax.devices()[:1]) is None
