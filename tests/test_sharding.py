"""A sharded step is the single-device step; four host devices in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import pytest

from jaxllm.sharding import make_mesh

LAW = """
import jax, numpy as np
from jaxllm.config import LlamaConfig, OptimizerConfig, PrecisionConfig, TrainingConfig
from jaxllm.models import build, init_params
from jaxllm.sharding import batch_sharding, make_mesh, state_shardings
from jaxllm.training.loss import build_loss
from jaxllm.training.optimizer import build_optimizer
from jaxllm.training.train_step import init_train_state, make_train_step

model = build(LlamaConfig(vocab_size=64, d_model=16, d_ff=32, num_layers=1, num_heads=2))
rule = build_optimizer(OptimizerConfig(learning_rate=1e-2), PrecisionConfig(), steps=10)
loss = build_loss(model, TrainingConfig(loss_chunk=16))
step = make_train_step(loss, rule, accumulation=1, dtype="float32")
state = init_train_state(init_params(model, jax.random.key(0)), rule, jax.random.key(1))
ids = np.random.default_rng(0).integers(0, 64, (4, 9)).astype(np.int32)
positions = np.tile(np.arange(8, dtype=np.int32), (4, 1))
batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "positions": positions}
batch |= {"segment_ids": np.ones((4, 8), np.int32), "weights": np.ones((4, 8), np.float32)}

single, metrics = jax.jit(step)(state, batch)
mesh = make_mesh(fsdp=2)
assert dict(mesh.shape) == {"data": 2, "fsdp": 2}
layout = state_shardings(state, mesh)
sharded = jax.jit(step, out_shardings=(layout, None))
placed, rows = jax.device_put(state, layout), jax.device_put(batch, batch_sharding(mesh))
many, many_metrics = sharded(placed, rows)
np.testing.assert_allclose(many_metrics.loss, metrics.loss, rtol=1e-5)
np.testing.assert_allclose(many_metrics.grad_norm, metrics.grad_norm, rtol=1e-4)
for a, b in zip(jax.tree.leaves(many.params), jax.tree.leaves(single.params), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)
kernel = many.params["layers"]["q_proj"]["kernel"]
assert kernel.addressable_shards[0].data.shape == (1, 8, 16)
moments = [x for x in jax.tree.leaves(many.opt_state) if x.shape == kernel.shape]
assert moments and all(x.addressable_shards[0].data.size <= x.size // 2 for x in moments)
print("equal")
"""


def test_sharded_equals_single() -> None:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", LAW], env={**os.environ, **flags}, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def test_groups_must_divide_the_devices() -> None:
    with pytest.raises(ValueError, match="1 devices can't be split into groups of 2"):
        make_mesh(jax.devices()[:1], fsdp=2)
