"""A fallback where cuDNN refuses the attention of a prompt: `attention: auto` takes blocks in plain JAX.

jax lowers and compiles when a function is first called, so that call raises the refusal; nothing is donated there.
Steps after the prompt attend to a cache and never use cuDNN.
"""

import logging
from collections.abc import Callable
from typing import TypeVar

from jaxllm.models.decoder import Decoder
from jaxllm.ops.cudnn_calls import refused

_log = logging.getLogger(__name__)
# Decoders with a refused program, so that it is not compiled again for the next prompt.
_refused: set[Decoder] = set()

R = TypeVar("R")


def fall_back(function: Callable[[Decoder], R], decoder: Decoder) -> R:
    """`function(decoder)`; if cuDNN refuses an attention, once more with a decoder that does not use cuDNN.

    A refusal of `attention: cudnn`, and any other error, is raised as it is.
    """
    if decoder not in _refused:
        try:
            return function(decoder)
        except Exception as error:
            if decoder.model.config.attention != "auto" or not refused(error):
                raise
            cause = str(error).splitlines()[0]
            _log.warning("attention: chunked instead of auto for prompts, because cuDNN refused one: %s", cause)
            _refused.add(decoder)
    return function(decoder.without_cudnn())
