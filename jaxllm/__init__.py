"""jaxllm: pretrain, decode and study Llama and T5 in JAX.

    jaxllm.pretrain(jaxllm.load_config("configs/llama_tiny.yaml"))
    model, params = jaxllm.load_run("runs/llama_tiny")   # load_hf for a Hugging Face directory
    text = jaxllm.load_text_model("runs/llama_tiny")     # with its tokenizer

`import jaxllm` loads jax, flax and optax, but no library for data, checkpoints or comparison. Names that need one,
such as `pretrain`, load it at first use. Import the modules of a room by name, such as `jaxllm.run.load`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxllm.config.file import ConfigError, load_config
from jaxllm.config.model import LlamaConfig, RopeConfig, T5Config
from jaxllm.config.run import DataConfig, OptimizerConfig, PrecisionConfig, RunConfig, ShardingConfig, TrainingConfig
from jaxllm.generation.beam import BeamSettings, beam_search
from jaxllm.generation.decoding import generate, generate_stream
from jaxllm.generation.edits import edited
from jaxllm.generation.scoring import score
from jaxllm.interop.hf import load_hf, save_hf
from jaxllm.models import T5, Llama, build, count_params, init_params
from jaxllm.ops.sampling import Sampling
from jaxllm.training.precision import dynamic_loss_scale
from jaxllm.training.program import program_of

if TYPE_CHECKING:
    from jaxllm.data.tokenizer import load_tokenizer
    from jaxllm.generation.text import TextModel
    from jaxllm.run.load import load_run, load_text_model
    from jaxllm.run.trainer import pretrain

__version__ = "0.1.0"

# Names whose modules import libraries for data or checkpoints; each loads at its first use.
_LAZY = {
    "TextModel": "jaxllm.generation.text",
    "load_run": "jaxllm.run.load",
    "load_text_model": "jaxllm.run.load",
    "load_tokenizer": "jaxllm.data.tokenizer",
    "pretrain": "jaxllm.run.trainer",
}
_ROOMS = ("config", "data", "generation", "host", "interop", "jaxprs", "models", "ops")
_ROOMS += ("run", "storage", "study", "training")

__all__ = ["ConfigError", "LlamaConfig", "RopeConfig", "T5Config", "load_config"]
__all__ += ["DataConfig", "OptimizerConfig", "PrecisionConfig", "RunConfig", "ShardingConfig", "TrainingConfig"]
__all__ += ["T5", "Llama", "build", "count_params", "init_params", "load_hf", "save_hf"]
__all__ += ["BeamSettings", "Sampling", "beam_search", "edited", "generate"]
__all__ += ["TextModel", "generate_stream", "load_run", "load_text_model", "load_tokenizer", "score"]
__all__ += ["dynamic_loss_scale", "pretrain", "program_of"]


def __getattr__(name: str) -> Any:
    """A name of `_LAZY`, or a room, at its first use."""
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    elif name in _ROOMS:
        value = importlib.import_module(f"jaxllm.{name}")
    else:
        raise AttributeError(f"module 'jaxllm' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_ROOMS})
