"""Which dtype is used where: one cast per optimizer step from float32 masters to the compute dtype.

The float32 islands live where the mathematics is: norms, softmax, RoPE angles, relative bias, logits and loss. Not
here: the loss scale (`jaxllm.training.loss_scale`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.config import PrecisionConfig

_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def compute_dtype(config: PrecisionConfig) -> Any:
    """The dtype of activations and matmul inputs."""
    return _DTYPES[config.compute]


def cast_floating(tree: Any, dtype: Any) -> Any:
    """Casts floating leaves to dtype and leaves integers and keys alone."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
