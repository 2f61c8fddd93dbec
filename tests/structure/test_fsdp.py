"""The program of a train step on several devices: its matmuls, and when it gathers weights and sums gradients."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from jaxllm.config import DataConfig, LlamaConfig, PrecisionConfig, RunConfig, T5Config, TrainingConfig
from jaxllm.config.model import ModelConfig
from jaxllm.models import abstract_params
from jaxllm.study.ledger import train_step_ledger, violations
from jaxllm.training.names import is_stacked
from jaxllm.training.program import program_of
from jaxllm.training.sharding import AXES, state_specs
from tests.structure.programs import dot_flops, equations

MESH = AbstractMesh((2, 4, 1), AXES, axis_types=(AxisType.Auto,) * 3)
SIZES = {"vocab_size": 64, "d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2}
LLAMA, T5 = LlamaConfig(**SIZES), T5Config(**SIZES, dropout_rate=0.1)
WAYS = [(layers, remat) for layers in ("scan", "unroll") for remat in ("none", "elementwise", "dots", "full")]
COLLECTIVES = ("all_gather", "reduce_scatter", "psum", "psum_invariant", "pmax", "all_to_all", "ppermute")


def config_of(model: ModelConfig, layers: str, remat: str) -> RunConfig:
    objective = "span_corruption" if model.encoder_decoder else "causal"
    data = DataConfig(sequence_length=16, objective=objective)
    training = TrainingConfig(batch_size=16, accumulation=2, loss_chunk=8)
    return RunConfig(model=dataclasses.replace(model, layers=layers, remat=remat), data=data, training=training)


def traced(config: RunConfig, mesh: Any) -> Any:
    program = program_of(config, mesh)
    return jax.jit(program.train_step).trace(program.abstract_state(), program.abstract_batch()).jaxpr.jaxpr


@pytest.mark.parametrize(
    ("model", "layers", "remat"),
    [*((LLAMA, *way) for way in WAYS), (T5, "scan", "none"), (T5, "unroll", "elementwise")],
    ids=lambda value: getattr(value, "family", value),
)
def test_layers_are_gathered_in_both_passes_and_multiplied_as_on_one_device(
    model: ModelConfig, layers: str, remat: str
) -> None:
    """Also with `remat: none`, where the backward pass must not find gathered weights saved, but all else."""
    config = config_of(model, layers, remat)
    jaxpr = traced(config, MESH)
    counts = Counter[str]()
    for equation, times in equations(jaxpr):
        counts[equation.primitive.name] += times
    params = abstract_params(program_of(config).model)
    leaves = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(state_specs(params, 4)), strict=True)
    split = [(leaf.shape[0], True) if is_stacked(path) else (1, False) for (path, leaf), spec in leaves if spec]
    assert counts["reduce_scatter"] == 2 * sum(layers for layers, _ in split)
    assert counts["all_gather"] == 2 * sum(layers * (1 + stacked) for layers, stacked in split)
    assert not {"all_to_all", "ppermute"} & counts.keys()
    # T5's relative bias is the same for all rows, so every device computes it.
    assert 1 <= dot_flops(jaxpr) * MESH.size / dot_flops(traced(config, None)) < (1.01 if model is T5 else 1 + 1e-9)


def test_gradients_are_summed_over_devices_in_float32() -> None:
    config = dataclasses.replace(config_of(LLAMA, "scan", "none"), precision=PrecisionConfig(compute="bfloat16"))
    entries = train_step_ledger(config, MESH)
    sums = {entry.accumulation for entry in entries if entry.operation in ("reduce_scatter", "psum", "psum_invariant")}
    assert sums == {"float32"} and not violations(entries)


def test_one_device_has_neither_shares_nor_collectives() -> None:
    names = {equation.primitive.name for equation, _ in equations(traced(config_of(LLAMA, "scan", "none"), None))}
    assert not names & {*COLLECTIVES, "shard_map", "remat2", "checkpoint"}
