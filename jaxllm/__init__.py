"""jaxllm: pretrain, decode and study Llama and T5 in JAX.

Importing it loads jax, flax and optax, but no data library, checkpoint library or reference: those are imported where
they are used. Besides what is named here: `jaxllm.generation` (streams, beams, scores, speculation, `Sampling`),
`jaxllm.study` (hidden states, attention maps, interventions), `jaxllm.training.loss.build_loss` and
`jaxllm.training.train_step` for loops of your own, and `jaxllm.data`.
"""

from jaxllm.config import (
    DataConfig,
    LlamaConfig,
    OptimizerConfig,
    PrecisionConfig,
    RopeConfig,
    RunConfig,
    T5Config,
    TrainingConfig,
)
from jaxllm.config.file import ConfigError, load_config
from jaxllm.generation import generate
from jaxllm.interop.hf import load_hf, save_hf
from jaxllm.models import build, count_params, init_params
from jaxllm.models.llama import Llama
from jaxllm.models.t5 import T5
from jaxllm.training.loss_scale import dynamic_loss_scale

__version__ = "0.1.0"

__all__ = [
    "T5",
    "ConfigError",
    "DataConfig",
    "Llama",
    "LlamaConfig",
    "OptimizerConfig",
    "PrecisionConfig",
    "RopeConfig",
    "RunConfig",
    "T5Config",
    "TrainingConfig",
    "build",
    "count_params",
    "dynamic_loss_scale",
    "generate",
    "init_params",
    "load_config",
    "load_hf",
    "save_hf",
]
