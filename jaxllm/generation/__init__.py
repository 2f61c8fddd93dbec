"""Decoding with a functional cache: continue, stream, search, speculate, score.

All take lists of token ids and return lists; they check and pad on the host, so they are called outside `jax.jit`. What
they compile is public as well: `jaxllm.models.llama.decode` and `jaxllm.models.t5.decode`. For text there is
`jaxllm.generation.text.TextModel`, which loads the tokenizers library and is therefore not imported here.
"""

from jaxllm.generation.beam import Beam, BeamSettings, beam_search
from jaxllm.generation.decoding import generate, generate_stream
from jaxllm.generation.edits import edited
from jaxllm.generation.scoring import score
from jaxllm.generation.speculative import Speculated, generate_speculative
from jaxllm.ops.sampling import Sampling

__all__ = [
    "Beam",
    "BeamSettings",
    "Sampling",
    "Speculated",
    "beam_search",
    "edited",
    "generate",
    "generate_speculative",
    "generate_stream",
    "score",
]
