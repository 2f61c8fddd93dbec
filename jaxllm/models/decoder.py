"""What the decoding loops need of a model family: one subclass of `Decoder` per family.

A decoder is a hashable value around a model, so that it can be a static argument. `context` is what a generation
keeps besides the cache: None for a decoder, the encoder's keys and values for an encoder-decoder. The loops close over
it and never carry it, so that it is neither copied nor mistaken for another batch's.
"""

import abc
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.models.cache import KVCache
from jaxllm.models.layers import apply
from jaxllm.models.model import Model, check_params


class Plan(NamedTuple):
    """Static sizes of one generation: two requests of equal plans share compiled code."""

    prompt: int  # columns of the padded prompts
    new: int  # most new tokens, rounded up
    start: int  # cache slots in use before the first new token
    slots: int  # of the cache; fewer than start + new when a sliding window wraps around
    length: int | None  # context length that dynamic and longrope scaling assume
    cache_dtype: str | None  # name of the cache's dtype; None is the compute dtype


@dataclass(frozen=True)
class Decoder(abc.ABC):
    """A family's functions for the decoding loops; the default methods suit a decoder-only model of any length.

    Such a model has a method `hidden` of tokens, and `logits` of hidden states.
    """

    model: Any

    def prepare(self, params: Any, *, int8: bool = False) -> Any:
        """The decoding layout of training parameters; prepared ones are returned as they are.

        Raises:
            TypeError: for a subclass of the family's model that overrides a method.
            ValueError: for parameters of another model.
        """
        check_params(self.model, params)
        return params

    def check(self, prompts: Sequence[Sequence[int]], *, new: Sequence[int]) -> None:
        """Raises a ValueError when a prompt can't be continued by so many `new` tokens; the default accepts all."""
        return

    def plan(self, *, prompt: int, new: int, needed: int, cache_dtype: str | None, wraps: bool) -> Plan:
        """Sizes for padded prompts and new tokens; the longest row really holds `needed` tokens."""
        return Plan(prompt, new, prompt, prompt + new, None, cache_dtype)

    @abc.abstractmethod
    def start(self, params: Any, tokens: Array, lengths: Array, plan: Plan) -> tuple[Any, Array, KVCache, Array]:
        """Context, logits of the first new token [B, V], cache, and that token's position [B]."""

    @abc.abstractmethod
    def step(
        self, params: Any, context: Any, cache: KVCache, tokens: Array, positions: Array, plan: Plan, attended: int
    ) -> tuple[Array, KVCache]:
        """Appends one token per row; logits [B, V] of the next."""

    def history(self, tokens: Array, lengths: Array) -> tuple[Array, Array]:
        """Tokens [B, T] before the first new one, as penalties of repetition count them, and which of them are real."""
        return tokens, jnp.arange(tokens.shape[1])[None] < lengths[:, None]

    def full_logits(
        self, params: Any, tokens: Array, lengths: Array, new: Array, *, length: int | None = None
    ) -> Float[Array, "B N V"]:
        """Logits that predict each of `new` [B, N] after the prompts, by one forward of the training model."""
        columns = lengths[:, None] + jnp.arange(new.shape[1])
        options = {} if length is None else {"length": length}
        rows = jnp.pad(tokens, ((0, 0), (0, new.shape[1])))
        rows = rows.at[jnp.arange(tokens.shape[0])[:, None], columns].set(new)  # prompts directly before new tokens
        hidden = apply(self.model, params, rows, **options, method="hidden")
        before = jnp.take_along_axis(hidden, columns[..., None] - 1, axis=1)
        return apply(self.model, params, before, method="logits")


# Methods that an override may change without changing what is generated.
_NOT_DECODED = {"lens"}


def check_methods(model: type, family: type) -> None:
    """Raises TypeError for a subclass that overrides methods of the family: decoding does not call those."""
    subclasses = model.__mro__[: model.__mro__.index(family)]
    changed = {
        name
        for cls in subclasses
        for name, value in vars(cls).items()
        if inspect.isfunction(inspect.unwrap(value)) and hasattr(family, name)
        if name == "__call__" or not name.startswith("__")
    }
    if changed - _NOT_DECODED:
        names = ", ".join(f"{model.__name__}.{name}" for name in sorted(changed - _NOT_DECODED))
        raise TypeError(
            f"cannot decode with {names}: decoding has its own functions for {family.__name__} and would ignore it; "
            f"use score or model.apply, which call it, or generate with a plain {family.__name__}"
        )


def check_prepared(model: Model, embed: Array, **layers: tuple[int, int]) -> None:
    """Raises ValueError unless prepared parameters have the model's embedding and, per stack, its number of layers."""
    shape = (model.config.vocab_size, model.config.d_model)
    wrong = [f"{found} {stack} layers, not {want}" for stack, (found, want) in layers.items() if found != want]
    if embed.shape != shape:
        wrong.append(f"embedding {embed.shape}, not {shape}")
    if wrong:
        raise ValueError(f"the prepared parameters are not those of the model: {'; '.join(wrong)}")
