"""A fallback where cuDNN refuses the attention of a prompt: `attention: auto` takes blocks in plain JAX.

jax lowers and compiles when a function is first called, so that call raises the refusal; nothing is donated there.
Steps after the prompt attend to a cache and never use cuDNN.
"""

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from jaxllm.models.decoder import Decoder
from jaxllm.ops.cudnn_calls import refused

_log = logging.getLogger(__name__)
# Decoders with a refused program, so that it is not compiled again for the next prompt.
_refused: set[Any] = set()

R = TypeVar("R")


def fall_back(function: Callable[..., R], *decoders: Decoder | None) -> R:
    """`function(*decoders)`; if cuDNN refuses an attention, once more with decoders that do not use cuDNN.

    A refusal of `attention: cudnn`, and any other error, is raised as it is.
    """
    chosen = [_without_cudnn(decoder) if decoder in _refused else decoder for decoder in decoders]
    try:
        return function(*chosen)
    except Exception as error:
        willing = {decoder for decoder in chosen if decoder is not None and decoder.model.config.attention == "auto"}
        if not willing or not refused(error):
            raise
        cause = str(error).splitlines()[0]
        _log.warning("attention: chunked instead of auto for prompts, because cuDNN refused one: %s", cause)
        _refused.update(willing)
    return function(*(_without_cudnn(decoder) if decoder in willing else decoder for decoder in chosen))


def _without_cudnn(decoder: Decoder | None) -> Decoder | None:
    return None if decoder is None else decoder.without_cudnn()
