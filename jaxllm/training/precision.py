"""Which dtype is used where: float32 master weights, one compute dtype, and float32 islands.

`precision.compute` sets the compute dtype, and `precision.islands` moves single islands: docs/mixed_precision.md has a
table of them. RoPE's angles, all sums, moments and updates are always float32. `scripts/precision_ledger.py` lists the
dtypes of a compiled train step. Out of scope: the loss scale (`jaxllm.training.loss_scale`).
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.config import RunConfig
from jaxllm.models import Model, build
from jaxllm.models.layers import Islands


def build_model(config: RunConfig) -> Model:
    """The model of a run, in the compute dtype and with the islands that `precision.islands` moves.

    >>> from jaxllm.config import LlamaConfig, PrecisionConfig
    >>> model = LlamaConfig(vocab_size=64, d_model=16, d_ff=32, num_layers=1, num_heads=2)
    >>> moved = PrecisionConfig(compute="bfloat16", islands={"softmax": "bfloat16"})
    >>> build_model(RunConfig(model=model, precision=moved)).islands.softmax
    dtype(bfloat16)
    """
    precision = config.precision
    islands = {name: jnp.dtype(dtype) for name, dtype in precision.islands.items() if name != "rope"}
    return build(config.model, dtype=jnp.dtype(precision.compute), islands=Islands(**islands))


def cast_floating(tree: Any, dtype: Any) -> Any:
    """Casts floating leaves to dtype and leaves integers and keys alone."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
