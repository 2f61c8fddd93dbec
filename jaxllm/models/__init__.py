"""The two families as thin Flax modules, and how to build one from its config."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.config import LlamaConfig, T5Config
from jaxllm.models.layers import DEFAULT_ISLANDS, Islands
from jaxllm.models.llama import Llama
from jaxllm.models.t5 import T5

Model = Llama | T5


def build(config: LlamaConfig | T5Config, *, dtype: Any = jnp.float32, islands: Islands = DEFAULT_ISLANDS) -> Model:
    """The model of a config.

    Args:
        config: architecture.
        dtype: of activations and matmul inputs.
        islands: dtypes of what does not follow `dtype`.
    """
    if isinstance(config, T5Config):
        return T5(config, dtype, islands)
    return Llama(config, dtype, islands)


def init_params(model: Model, key: jax.Array) -> dict[str, Any]:
    """Random parameters in float32; jitted, because op-by-op initialisation costs seconds."""
    return jax.jit(lambda k: model.init(k, *_inputs(model))["params"])(key)


def abstract_params(model: Model) -> dict[str, Any]:
    """Shapes and dtypes of the parameters, without allocating them."""
    return jax.eval_shape(lambda: model.init(jax.random.key(0), *_inputs(model))["params"])


def _inputs(model: Model) -> tuple[jax.Array, ...]:
    tokens = jnp.zeros((1, 2), jnp.int32)
    return (tokens, tokens) if isinstance(model, T5) else (tokens,)


def count_params(model: Model) -> int:
    """Number of parameters, from shapes alone."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model)))
