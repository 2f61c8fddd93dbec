"""Runs on meshes of eight host devices against runs on one: prints their differences for `test_meshes`, as JSON."""

from __future__ import annotations

import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.config import RunConfig
from jaxllm.config.file import parse_config
from jaxllm.run.overflow import OverflowWatch
from jaxllm.storage.checkpoint import Checkpoints
from jaxllm.training.program import Program, program_of
from jaxllm.training.sharding import make_mesh, place_rows, state_shardings, with_shardings
from jaxllm.training.spans import make_predict_step

STEPS = 6
# Llama in packed rows: the same numbers whatever the loop, rematerialisation and microbatches.
LLAMA = {"family": "llama", "vocab_size": 50, "d_model": 16, "d_ff": 24, "num_layers": 2, "num_heads": 2}
# T5 with dropout, whose keys are those of microbatches. 50 is no multiple of 4 or 8, so the embedding's width is split.
T5 = {"family": "t5", "vocab_size": 50, "d_model": 16, "d_ff": 24, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.1}
HALF = {"compute": "float16", "loss_scale": "dynamic", "initial_scale": 2.0**10, "growth_interval": 2}


def run_config(model: dict[str, Any], how: str, accumulation: int, fsdp: int, **precision: Any) -> RunConfig:
    layers, remat = how.split()
    data: dict[str, Any] = {"sequence_length": 16}
    if model["family"] == "t5":
        data |= {"objective": "span_corruption", "example_length": 8}
    training = {"steps": STEPS, "batch_size": 16, "accumulation": accumulation, "loss_chunk": 8}
    sections = {"model": model | {"layers": layers, "remat": remat}, "data": data, "training": training}
    return parse_config(
        sections | {"optimizer": {"learning_rate": 1e-3}, "precision": precision, "sharding": {"fsdp": fsdp}}
    )


def batch_of(program: Program, number: int) -> dict[str, np.ndarray]:
    rng, rows = np.random.default_rng(number), {}
    for name, field in program.abstract_batch().items():
        values = rng.integers(1, 50, field.shape)
        if name.endswith("segment_ids"):
            values = np.sort(values % 3 + 1, axis=1)
            values[:, -2:] = 0
        elif name.endswith("positions"):
            values = np.broadcast_to(np.arange(field.shape[1]), field.shape)
        elif name == "weights":
            values = rng.random(field.shape) < 0.8
        rows[name] = np.ascontiguousarray(values, field.dtype)
    return rows


class Result:
    """Losses and norms of the steps, the first moments after the first step, parameters at the end, evaluations."""

    def __init__(self, config: RunConfig, one: Result | None = None) -> None:
        """On one device, or on all and from the state from which `one` has started."""
        before = time.process_time()
        self.mesh = None if one is None else make_mesh(fsdp=config.sharding.fsdp)
        self.program = program = program_of(config, self.mesh)
        layout = state_shardings(program.abstract_state(), self.mesh)
        self.start = jax.jit(program.fresh_state)() if one is None else one.start
        state = jax.device_put(self.start, layout)
        step = jax.jit(program.train_step, out_shardings=(layout, None))
        self.rows, self.first = [], {}
        for number in range(STEPS):
            state, metrics = step(state, place_rows(batch_of(program, number), self.mesh))
            self.rows.append([float(metrics.loss), float(metrics.loss_scale), float(metrics.skipped)])
            if not self.first:
                self.first = moments(state.opt_state)
        self.state = state
        self.evaluated, self.predicted = None, None
        if self.mesh is None or config.sharding.fsdp == 4:
            placed = place_rows(batch_of(program, 0), self.mesh)
            self.evaluated = np.array(jax.device_get(jax.jit(program.eval_step)(state.params, placed)))
            if config.model.encoder_decoder:
                self.predicted = np.asarray(jax.jit(make_predict_step(program, self.mesh))(state.params, placed))
        self.against = {} if one is None else self._against(one)
        print(self.mesh and self.mesh.shape, config.model.family, time.process_time() - before, file=sys.stderr)

    def _against(self, one: Result) -> dict[str, Any]:
        """Relative differences of losses and gradients (of each leaf's largest), absolute ones of parameters."""
        rows, expected = np.array(self.rows), np.array(one.rows)
        gradients = [
            apart(self.first[path], first) / max(float(np.abs(first).max()), 1e-30) for path, first in one.first.items()
        ]
        ends = zip(jax.tree.leaves(self.state.params), jax.tree.leaves(one.state.params), strict=True)
        return {
            "mesh": list(self.mesh.shape.values()) if self.mesh else [],
            "loss": float(np.abs(rows[:, 0] / expected[:, 0] - 1).max()),
            "scales": (rows[:, 1:] == expected[:, 1:]).all().item(),
            "skipped": rows[-1, 2],
            "gradients": max(gradients),
            "parameters": max(apart(a, b) for a, b in ends),
            "evaluated": 0.0 if self.evaluated is None else apart(self.evaluated / one.evaluated, 1.0),
            "predicted": self.predicted is None or (self.predicted == one.predicted).all().item(),
        }


def moments(state: Any) -> dict[str, np.ndarray]:
    """Adam's first moments, a tenth of the clipped gradients after one step."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {name: np.asarray(leaf) for path, leaf in leaves if ".mu[" in (name := jax.tree_util.keystr(path))}


def apart(left: Any, right: Any) -> float:
    return float(np.abs(np.asarray(left, np.float64) - np.asarray(right, np.float64)).max())


def moved(result: Result, single: RunConfig, folder: Path) -> bool:
    """Whether a checkpoint holds the same bits on other meshes and on one device."""
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(STEPS, result.state, {})
    checkpoints.wait()
    same = []
    for mesh in (make_mesh(fsdp=8), make_mesh(fsdp=2), None):
        restored = checkpoints.restore(with_shardings(program_of(single).abstract_state(), mesh))
        assert restored is not None
        pairs = zip(jax.tree.leaves(result.state.params), jax.tree.leaves(restored.state.params), strict=True)
        same += [(np.asarray(a) == np.asarray(b)).all().item() for a, b in pairs]
    checkpoints.close()
    return all(same)


def overflow(config: RunConfig) -> dict[str, Any]:
    """What the host finds in a batch on one device and on a mesh: with a parameter too large, and with all well."""
    found = []
    for mesh in (None, make_mesh(fsdp=4)):
        program = program_of(config, mesh)
        state = jax.jit(program.fresh_state)()
        watch, batch = OverflowWatch(program, state.params, mesh=mesh), place_rows(batch_of(program, 0), mesh)
        layout = state_shardings(state, mesh)
        headroom = watch.headroom(1, jax.device_put(state, layout), batch)
        kernel = state.params["layers"]["up_proj"]["kernel"]
        kernel = kernel.at[1, 3, 5].set(6e4)  # within float16's range, unlike its products
        state.params["layers"]["up_proj"]["kernel"] = kernel
        found.append((watch.first_value(1, jax.device_put(state, layout), batch), headroom))
    (value, room), (spread_value, spread_room) = found
    apart_by = max(abs(room[block] - spread_room[block]) for block in room | spread_room)
    return {"single": value, "spread": spread_value, "blocks": len(room), "headroom": apart_by}


def main(folder: Path) -> None:
    llama, t5 = functools.partial(run_config, LLAMA), functools.partial(run_config, T5)
    report: dict[str, Any] = {}
    one = Result(llama("scan elementwise", 2, 1))
    report["llama scan none"] = Result(llama("scan none", 1, 8), one).against
    sharded = Result(llama("unroll full", 2, 4), one)
    report["llama unroll full"] = sharded.against
    report["moved"] = moved(sharded, llama("unroll full", 2, 1), folder)
    report["llama scan elementwise"] = Result(llama("scan elementwise", 2, 2), one).against
    report["llama unroll none"] = Result(llama("unroll none", 2, 1), one).against
    half = llama("scan full", 2, 4, **HALF)
    report["llama float16"] = Result(half, Result(half)).against
    report["overflow"] = overflow(half)
    one = Result(t5("scan none", 2, 1))
    report["t5 scan elementwise"] = Result(t5("scan elementwise", 2, 4), one).against
    report["t5 unroll none"] = Result(t5("unroll none", 2, 8), one).against
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
