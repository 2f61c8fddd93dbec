"""jax's own switches and transformations around the models: what a user may turn on or wrap around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from jaxllm.config import LlamaConfig, T5Config, TrainingConfig
from jaxllm.models import abstract_params, build, init_params
from jaxllm.training.loss import build_loss

LLAMA = LlamaConfig(vocab_size=50, d_model=16, d_ff=24, num_layers=2, num_heads=4, num_kv_heads=2, max_length=32)
T5 = T5Config(vocab_size=50, d_model=16, d_ff=24, num_layers=2, num_heads=2, head_dim=8)
TOKENS = np.arange(12, dtype=np.int32).reshape(2, 6)
BOTH = pytest.mark.parametrize("config", [LLAMA, T5], ids=["llama", "t5"])


def batch_of(config: LlamaConfig | T5Config) -> dict[str, np.ndarray]:
    names = ("encoder_tokens", "decoder_tokens") if config.family == "t5" else ("tokens",)
    return dict.fromkeys(names, TOKENS) | {"targets": TOKENS[:, ::-1], "weights": np.ones(TOKENS.shape, np.float32)}


def mean_loss(config: LlamaConfig | T5Config) -> Callable[[Any], Any]:
    loss = build_loss(build(config), TrainingConfig(loss_chunk=8))

    def mean(params: Any) -> Any:
        sums = loss(params, batch_of(config), None)
        return sums.loss / sums.weight

    return mean


@BOTH
def test_parameters_are_float32_under_x64(config: LlamaConfig | T5Config) -> None:
    want = init_params(build(config), jax.random.key(0))
    with jax.enable_x64(True):
        got = init_params(build(config), jax.random.key(0))
        assert {leaf.dtype.name for leaf in jax.tree.leaves((got, abstract_params(build(config))))} == {"float32"}
        assert all(map(np.array_equal, jax.tree.leaves(got), jax.tree.leaves(want)))
