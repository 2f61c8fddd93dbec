"""Decoding with a functional cache: continue, stream, search, score."""

from jaxllm.generation.beam import Beam, BeamSettings, beam_search
from jaxllm.generation.generate import generate, generate_stream
from jaxllm.generation.score import score

__all__ = ["Beam", "BeamSettings", "beam_search", "generate", "generate_stream", "score"]
