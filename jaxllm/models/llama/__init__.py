"""Llama: one layer, the model around it, and its decoding."""

from jaxllm.models.llama.model import Llama

__all__ = ["Llama"]
