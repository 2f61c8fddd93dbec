"""T5: its layers, encoder and decoder around them, and its decoding."""

from jaxllm.models.t5.model import T5

__all__ = ["T5"]
