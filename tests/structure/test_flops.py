"""The published FLOP formulas equal the matmuls of the traced step, exactly."""

from __future__ import annotations

import dataclasses

import pytest

from jaxllm.config import DataConfig, LlamaConfig, RunConfig, T5Config, TrainingConfig
from jaxllm.models.family import train_flops
from tests.structure.programs import dot_flops, traced_train_step


def run(model: LlamaConfig, length: int) -> RunConfig:
    training = TrainingConfig(batch_size=4, accumulation=2, loss_chunk=2 * length // 4)
    return RunConfig(model=model, data=DataConfig(sequence_length=length), training=training)


@pytest.mark.parametrize("layers", ["unroll", "scan"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_llama_formula_is_the_dot_count(tiny: LlamaConfig, layers: str, kv_heads: int) -> None:
    model = dataclasses.replace(tiny, layers=layers, num_kv_heads=kv_heads, head_dim=10, attention="reference")
    config = run(model, 16)
    counted = dot_flops(traced_train_step(config).jaxpr.jaxpr)
    flops = train_flops(model, batch=4, length=16)
    assert counted == flops.full
    # The causal figure leaves out half of the attention.
    assert flops.full - flops.causal == flops.causal - flops.weights


def test_elementwise_remat_repeats_only_the_scores(tiny: LlamaConfig) -> None:
    counts = {}
    for remat in ("none", "elementwise", "full"):
        model = dataclasses.replace(tiny, remat=remat, attention="reference")
        counts[remat] = dot_flops(traced_train_step(run(model, 16)).jaxpr.jaxpr)
    scores = 2 * (4 * 4 * 16 * 16 * 8) * 3  # of 4 rows, 4 heads and 3 layers; the weights are not kept
    assert counts["elementwise"] == counts["none"] + scores
    assert counts["full"] > counts["elementwise"]


def test_t5_formula_is_the_dot_count_but_for_the_bias_tables() -> None:
    sizes = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4, "head_dim": 8}
    model = T5Config(vocab_size=97, layers="unroll", attention="reference", **sizes)
    data = DataConfig(objective="span_corruption", sequence_length=16, target_length=8)
    config = RunConfig(model=model, data=data, training=TrainingConfig(batch_size=4, loss_chunk=16))
    # Each stack's table meets its one-hot buckets, one per distance, once forward and once backward; before that the
    # gradients of a distance are summed by a matmul.
    bias = 2 * 2 * model.relative_buckets * model.num_heads * (2 * 16 + 2 * 8)
    bias += 2 * model.num_heads * (16 * (2 * 16 - 1) + 8 * (2 * 8 - 1))
    flops = train_flops(model, batch=4, length=16, target_length=8)
    assert dot_flops(traced_train_step(config).jaxpr.jaxpr) == flops.full + bias
