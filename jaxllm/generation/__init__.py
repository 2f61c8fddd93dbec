"""Decoding with a functional cache."""

from jaxllm.generation.generate import generate

__all__ = ["generate"]
