"""Decoding with a functional cache: continue, stream, search, speculate, score."""

from jaxllm.generation.beam import Beam, BeamSettings, beam_search
from jaxllm.generation.generate import generate, generate_stream
from jaxllm.generation.score import score
from jaxllm.generation.speculative import Speculated, generate_speculative

__all__ = [
    "Beam",
    "BeamSettings",
    "Speculated",
    "beam_search",
    "generate",
    "generate_speculative",
    "generate_stream",
    "score",
]
