"""Settings: how one is declared (`setting`), those of models (`model`) and of a run (`run`), their YAML (`file`)."""

from jaxllm.config.model import LlamaConfig, ModelConfig, Objective, RopeConfig, T5Config
from jaxllm.config.run import DataConfig, Float, Island, OptimizerConfig, PrecisionConfig, RunConfig, TrainingConfig

__all__ = [
    "DataConfig",
    "Float",
    "Island",
    "LlamaConfig",
    "ModelConfig",
    "Objective",
    "OptimizerConfig",
    "PrecisionConfig",
    "RopeConfig",
    "RunConfig",
    "T5Config",
    "TrainingConfig",
]
