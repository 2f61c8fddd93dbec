"""Decoding with values replaced inside the model: parameters with edits, which all functions here accept.

The loops call the model by `run_model`, so the edits apply to the prompt and to every step after it. The cache then
holds edited keys and values.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

from jax.tree_util import Partial

from jaxllm.jaxprs.hooks import Edit, edit
from jaxllm.models.decoder import Decoder

R = TypeVar("R")


class Edited(NamedTuple):
    """Parameters with edits, as `edited` makes them."""

    params: Any  # stacked as in training, or prepared
    # by name, each a `jax.tree_util.Partial`, whose arrays are arguments of the compiled program
    edits: OrderedDict[str, Any]


def edited(params: Any, edits: Mapping[str, Edit]) -> Edited:
    """Parameters for `generate` and the like, with which the model runs with values replaced.

    Args:
        params: as they would be passed without edits.
        edits: as in `jaxllm.study.edit`; a value is [B, T, ...], with T = 1 while new tokens are decoded. Each new
            function object compiles again, so define it once, and pass changing arrays by `jax.tree_util.Partial`.

    Raises:
        ValueError: for attention weights, which decoding never holds; for parameters that are edited already.

    Example:
        >>> import jax, jaxllm
        >>> import jax.numpy as jnp
        >>> from jax.tree_util import Partial
        >>> config = jaxllm.LlamaConfig(vocab_size=20, d_model=8, d_ff=8, num_layers=2, num_heads=2)
        >>> model = jaxllm.build(config)
        >>> params = jaxllm.init_params(model, jax.random.key(0))
        >>> def steer(vector, x, layer):
        ...     return jnp.where(layer == 1, x + vector, x)
        >>> steered = jaxllm.edited(params, {"after_mlp": Partial(steer, jnp.ones(8))})
        >>> len(jaxllm.generate(model, steered, [[1, 2, 3]], max_new_tokens=4)[0])
        4
    """
    if isinstance(params, Edited):
        raise ValueError("the parameters are edited already: give all edits at once")
    for name in edits:
        if name.split("/")[-1] == "attention_weights":
            raise ValueError(f"{name} can't be edited while decoding, which never holds them: edit heads or query")
    # A partial of a partial would be a new function each time.
    made = [(name, change if isinstance(change, Partial) else Partial(change)) for name, change in edits.items()]
    # Edits of one hook point apply in their order. jit would sort the keys of a dict.
    return Edited(params, OrderedDict(made))


def without_edits(params: Any) -> Any:
    """The parameters themselves."""
    return params.params if isinstance(params, Edited) else params


def prepare(decoder: Decoder, params: Any) -> Any:
    """The parameters in the decoding layout; their edits stay."""
    if isinstance(params, Edited):
        return params._replace(params=decoder.prepare(params.params))
    return decoder.prepare(params)


def run_model(method: Callable[..., R], params: Any, *arrays: Any, strict: bool = True, **sizes: Any) -> R:
    """`method(params, *arrays, **sizes)` of a `Decoder`, with the edits of the parameters if they have any.

    `strict` makes an edit of an unknown hook point an error. The first call checks the names; a decoder's step no
    longer has the hook points of the encoder.
    """
    if not isinstance(params, Edited):
        return method(params, *arrays, **sizes)
    return edit(partial(method, **sizes), params.edits, strict=strict)(params.params, *arrays)
