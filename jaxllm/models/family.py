"""The families: one row for each, and the functions that serve a model of any family.

To add one, write its config class (`jaxllm.config.model.MODEL_CONFIGS`), its module and functions, and a row of
`FAMILIES`. A row of `jaxllm.interop.hf` reads and writes its Hugging Face files.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxllm.config import ModelConfig
from jaxllm.models.decoder import Decoder
from jaxllm.models.layers import DEFAULT_ISLANDS, Islands
from jaxllm.models.llama import model as llama
from jaxllm.models.llama.decode import LlamaDecoder
from jaxllm.models.model import Flops, Model, check_model
from jaxllm.models.t5 import model as t5
from jaxllm.models.t5.decode import T5Decoder


class Family(NamedTuple):
    """The differences between families that their config classes do not hold."""

    module: type[nn.Module]  # of (config, dtype, islands)
    hidden: Callable[..., jax.Array]  # (model, params, batch, key or None) -> states [B, T, D] of a training batch
    flops: Callable[[Any, int, int, int], Flops]  # (config, batch, length, target_length) -> work of a train step
    decoder: Callable[[Any], Decoder]  # model -> its side of the decoding loops


FAMILIES: dict[str, Family] = {
    "llama": Family(llama.Llama, llama.hidden, llama.train_flops, LlamaDecoder),
    "t5": Family(t5.T5, t5.hidden, t5.train_flops, T5Decoder),
}


def family_of(model: Model) -> Family:
    """The row of a model's family."""
    return FAMILIES[model.config.family]


def decoder_of(model: Model) -> Decoder:
    """A model's side of the decoding loops."""
    check_model(model)
    return family_of(model).decoder(model)


def build(config: ModelConfig, *, dtype: Any = jnp.float32, islands: Islands = DEFAULT_ISLANDS) -> Model:
    """The model of a config: a Flax module, called as `model.apply({"params": params}, tokens)`.

    Args:
        config: architecture.
        dtype: of activations and matmul inputs, such as jnp.bfloat16 or "bfloat16".
        islands: dtypes of what does not follow `dtype`.

    Raises:
        ValueError: for anything but a model config, or a dtype that is not floating.
    """
    if not isinstance(config, ModelConfig):
        hint = "; pass its .model" if hasattr(config, "model") else ""
        raise ValueError(f"build needs a LlamaConfig or a T5Config, got {type(config).__name__}{hint}")
    if config.family not in FAMILIES:
        raise ValueError(f"no family {config.family!r}; {', '.join(FAMILIES)} have a row in jaxllm.models.FAMILIES")
    if not _is_floating(dtype):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    return FAMILIES[config.family].module(config, dtype, islands)


def _is_floating(dtype: Any) -> bool:
    try:
        return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        return False


def train_flops(config: ModelConfig, *, batch: int, length: int, target_length: int = 0) -> Flops:
    """Work of forward and backward on `batch` rows of `length` (and `target_length`) tokens."""
    return FAMILIES[config.family].flops(config, batch, length, target_length)
