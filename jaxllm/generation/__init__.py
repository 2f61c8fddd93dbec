"""Decoding with a functional cache: continue, stream, search, score.

All functions take lists of token ids and return lists. They check and pad on the host, so call them outside `jax.jit`;
for use inside it there are `jaxllm.models.llama.decode` and `jaxllm.models.t5.decode`. For text there is
`jaxllm.generation.text.TextModel`, which is not imported here because it loads the tokenizers library.
"""

from jaxllm.generation.beam import Beam, BeamSettings, beam_search
from jaxllm.generation.decoding import generate, generate_stream
from jaxllm.generation.edits import edited
from jaxllm.generation.scoring import score
from jaxllm.ops.sampling import Sampling

__all__ = ["Beam", "BeamSettings", "Sampling"]
__all__ += ["beam_search", "edited", "generate", "generate_stream", "score"]
