"""Settings: how one is declared (`setting`), those of models (`model`) and of a run (`run`), their YAML (`file`)."""

from jaxllm.config.model import LlamaConfig, ModelConfig, Objective, RopeConfig, T5Config
from jaxllm.config.run import DataConfig, Float, Island, OptimizerConfig, PrecisionConfig, RunConfig, TrainingConfig

__all__ = ["LlamaConfig", "ModelConfig", "Objective", "RopeConfig", "T5Config"]
__all__ += ["DataConfig", "Float", "Island", "OptimizerConfig", "PrecisionConfig"]
__all__ += ["RunConfig", "TrainingConfig"]
