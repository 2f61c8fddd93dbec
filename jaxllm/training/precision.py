"""Which dtype is used where: float32 master weights, one compute dtype, and float32 islands.

`precision.compute` sets all of it. The islands are where the mathematics is, and each is float32 whatever the compute
dtype: the squares and root of a norm (`ops.norms`), scores after their product and the softmax (`ops.attention`),
angles of RoPE (`ops.rope`), T5's relative bias until it is laid out (`ops.relative_bias`), T5's MLP output under
float16 (`ops.linear.linear_float32`), logits and loss (`ops.losses`). `precision.islands` moves single ones, and the
residual stream; RoPE's angles, all sums, moments and updates stay float32 by law. `scripts/precision_ledger.py` shows
them in the program itself. Out of scope: the loss scale (`jaxllm.training.loss_scale`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.config import PrecisionConfig, RunConfig
from jaxllm.models import Model, build
from jaxllm.models.layers import Islands

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


class Policy(NamedTuple):
    """The dtypes of a run.

    Attributes:
        param: master weights, gradients, moments.
        compute: activations and matmul inputs; master weights are cast to it once per step.
        output: logits and losses.
        islands: what the config moves; the rest is None, the default.
    """

    param: Any
    compute: Any
    output: Any
    islands: Islands


def policy(config: PrecisionConfig) -> Policy:
    """The dtypes that a config means."""
    moved = {name: _DTYPES[dtype] for name, dtype in config.islands.items() if name != "rope"}
    return Policy(jnp.float32, _DTYPES[config.compute], jnp.float32, Islands(**moved))


def compute_dtype(config: PrecisionConfig) -> Any:
    """The dtype of activations and matmul inputs."""
    return policy(config).compute


def build_model(config: RunConfig) -> Model:
    """The model of a run, in its dtypes."""
    dtypes = policy(config.precision)
    return build(config.model, dtype=dtypes.compute, islands=dtypes.islands)


def cast_floating(tree: Any, dtype: Any) -> Any:
    """Casts floating leaves to dtype and leaves integers and keys alone."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
