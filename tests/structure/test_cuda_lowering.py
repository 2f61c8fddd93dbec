"""Every real-size config lowers for CUDA on a machine without a GPU: abstractly, nothing allocated or compiled."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxllm.config import T5Config, TrainingConfig
from jaxllm.config.file import load_config
from jaxllm.models import abstract_params, build
from jaxllm.training.loss import build_loss
from tests.structure.programs import equations, pretend_gpu, traced_train_step

CONFIGS = sorted((Path(__file__).parent.parent.parent / "configs").glob("*.yaml"))
REAL = [path for path in CONFIGS if "tiny" not in path.stem]


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_train_step_lowers_with_fused_attention(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch)
    config = load_config(path)
    # A scan over layers lowers one layer; the unrolled program is the same layer again.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, layers="scan"))
    text = traced_train_step(config).lower(lowering_platforms=("cuda",)).as_text()
    stacks = 1 if config.model.family == "llama" else 3
    forward = stacks * (2 if config.model.remat == "full" else 1)
    assert text.count("@__cudnn$fmha") == forward + stacks
    assert text.count("Backward(") == stacks
    assert "tf.aliasing_output" in text or "jax.buffer_donor" in text


@pytest.mark.parametrize("layers", [2, 3])
def test_lengths_are_bounded_once_per_stack_and_not_in_each_layer(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is a kernel, and rematerialisation would run it again in every layer."""
    pretend_gpu(monkeypatch)
    sizes: dict[str, Any] = {
        "vocab_size": 97,
        "d_model": 16,
        "d_ff": 24,
        "num_layers": layers,
        "num_heads": 2,
        "head_dim": 8,
    }
    model = build(T5Config(**sizes, layers="unroll", remat="elementwise"), dtype=jnp.bfloat16)
    tokens, lengths = jax.ShapeDtypeStruct((4, 256), jnp.int32), jax.ShapeDtypeStruct((4,), jnp.int32)
    batch = {name: tokens for name in ("encoder_tokens", "decoder_tokens", "targets")}
    batch |= {"weights": jax.ShapeDtypeStruct((4, 256), jnp.float32), "encoder_lengths": lengths}
    loss = build_loss(model, TrainingConfig())
    traced = jax.make_jaxpr(jax.grad(lambda params, rows: loss(params, rows, None).loss))(abstract_params(model), batch)
    bounds = [
        eqn for eqn, _ in equations(traced.jaxpr) if eqn.primitive.name == "max" and eqn.outvars[0].aval.shape == (4,)
    ]
    assert len(bounds) == 2
    assert "dot_product_attention_fwd" in str(traced)
