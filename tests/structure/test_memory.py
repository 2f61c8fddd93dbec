"""Memory by structure: donation aliases all of the state, the loss holds one chunk, and estimates bound the truth."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import pytest

from jaxllm.config import DataConfig, LlamaConfig, OptimizerConfig, PrecisionConfig, RunConfig, TrainingConfig
from jaxllm.config.file import load_config
from jaxllm.models import build, count_params
from jaxllm.ops.losses import chunked_cross_entropy
from jaxllm.training.fit import FitError, check_fit, estimate_fit
from jaxllm.training.program import program_of
from tests.structure.programs import pretend_gpu, traced_train_step

CONFIGS = Path(__file__).parent.parent.parent / "configs"
# What a process gets of a card's memory: 92% of an 80 GB and of a 141 GB one.
CARDS = {80: 0.92 * 81_559 * 2**20, 141: 0.92 * 143_771 * 2**20}


def run(model: LlamaConfig, *, rows: int = 8, length: int = 64, **training: object) -> RunConfig:
    return RunConfig(
        model=model,
        data=DataConfig(sequence_length=length),
        training=TrainingConfig(batch_size=rows, **training),
    )


def estimate(config: RunConfig):
    return estimate_fit(program_of(config))


def test_a_step_aliases_its_state_and_fits_its_estimate(tiny: LlamaConfig) -> None:
    config = run(dataclasses.replace(tiny, attention="reference"), loss_chunk=64)
    traced = traced_train_step(config)
    memory = traced.lower().compile().memory_analysis()
    state = traced.in_avals[0][0]
    held = sum(x.size * 4 for x in jax.tree.leaves((state.params, state.opt_state)))
    # Exactly what is donated: the state, with 4 bytes for the step's number and 8 for the key.
    assert memory.alias_size_in_bytes == held + 4 + 8
    fit = estimate(config)
    assert fit.parameters == 4 * count_params(build(config.model))
    assert fit.parameters + fit.moments == pytest.approx(held, rel=1e-3)
    assert 1 <= (fit.gradients + fit.activations + fit.logits) / memory.temp_size_in_bytes < 1.7


def test_each_setting_moves_its_part_of_the_estimate(tiny: LlamaConfig) -> None:
    model = dataclasses.replace(tiny, attention="chunked")
    plain = estimate(run(model))
    assert estimate(run(dataclasses.replace(model, remat="full"))).activations < plain.activations / 2
    assert estimate(run(model, accumulation=4)).activations < plain.activations / 3
    assert estimate(run(model, loss_chunk=16)).logits < plain.logits / 4
    low = dataclasses.replace(
        run(model), precision=PrecisionConfig(compute="bfloat16"), optimizer=OptimizerConfig(moment_dtype="bfloat16")
    )
    assert estimate(low).parameters == 1.5 * plain.parameters
    assert estimate(low).moments == pytest.approx(0.75 * plain.moments, rel=0.01)
    check_fit(plain, 100, limit=100)
    with pytest.raises(
        FitError, match=r"needs at least 0\.2 GB and the device has 0\.1 GB; .* activations: raise training.accum"
    ):
        check_fit(plain, 200_000_000, limit=100_000_000)


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_no_parameter_counts_as_an_activation(tiny: LlamaConfig, layers: Literal["scan", "unroll"]) -> None:
    """A few tokens in wide layers: the backward pass receives slices of the stacked parameters."""
    fit = estimate(run(dataclasses.replace(tiny, d_model=128, d_ff=2048, layers=layers), rows=1, length=4))
    assert fit.activations < fit.parameters / 3


@pytest.mark.parametrize(
    "name", ["llama_125m", "llama3_1b", "llama3_8b", "llama3_8b_80gb", "t5_small", "t5_base", "t5_large"]
)
def test_real_size_configs_fit_their_card(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch)
    config = load_config(CONFIGS / f"{name}.yaml")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, layers="scan"))
    fit = estimate(config)
    assert sum(fit) < CARDS[141]
    if name == "llama3_8b":
        with pytest.raises(FitError, match=r"needs at least 130\.6 .* parameters: choose a smaller model"):
            check_fit(fit, sum(fit), limit=int(CARDS[80]))
    else:
        assert sum(fit) < CARDS[80]


def test_the_vocabulary_loss_holds_one_chunk_of_logits() -> None:
    rows, vocab, width, chunk = 4096, 4096, 16, 128
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((1, rows, width), jnp.float32),
            ((vocab, width), jnp.float32),
            ((1, rows), jnp.int32),
            ((1, rows), jnp.float32),
        )
    ]

    def loss(hidden, head, targets, weights):
        return chunked_cross_entropy(hidden, head, targets, weights, chunk=chunk).loss

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    chunks = compiled.memory_analysis().temp_size_in_bytes / (4 * chunk * vocab)
    assert chunks < 4  # all logits would be 32 chunks
