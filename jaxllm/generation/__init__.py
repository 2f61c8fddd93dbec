"""Decoding with a functional cache: continue, stream, search, score."""

from jaxllm.generation.generate import generate, generate_stream

__all__ = ["generate", "generate_stream"]
