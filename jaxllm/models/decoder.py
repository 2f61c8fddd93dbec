"""What the decoding loops need of a model family, and nothing else of it: one small adapter per family.

An adapter is a hashable value around a model, so that it can be a static argument. `context` is what a generation
keeps besides the cache: nothing for a decoder, the encoder's keys and values for an encoder-decoder. It is closed over
by the loops, never carried, so that it is neither copied nor mistaken for another batch's.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.models.cache import KVCache
from jaxllm.models.params import Model


class Plan(NamedTuple):
    """Static sizes of one generation: two requests of equal plans share compiled code.

    Attributes:
        prompt: columns of the padded prompts.
        new: most new tokens, rounded up.
        start: cache slots that are in use before the first new token.
        slots: of the cache; fewer than start + new when a sliding window wraps around.
        length: context length that dynamic and longrope scaling assume.
        cache_dtype: name of the cache's dtype; None is that of the computation.
    """

    prompt: int
    new: int
    start: int
    slots: int
    length: int | None
    cache_dtype: str | None


@runtime_checkable
class Decoder(Protocol):
    """One family's side of the decoding loops."""

    @property
    def model(self) -> Model:
        """The model itself."""
        ...

    def without_cudnn(self) -> Decoder:
        """The same, with attention over prompts by blocks in plain JAX."""
        ...

    def prepare(self, params: Any, *, int8: bool = False) -> Any:
        """The decoding layout of training parameters, which must be the model's; returns what is already prepared.

        Raises:
            TypeError: for a subclass of the family's model that overrides a method.
            ValueError: for parameters of another model.
        """
        ...

    def check(self, prompts: Sequence[Sequence[int]], *, new: int, pad_id: int) -> None:
        """Raises a ValueError when the prompts can't be continued by `new` tokens."""
        ...

    def plan(self, *, prompt: int, new: int, needed: int, cache_dtype: str | None, wraps: bool) -> Plan:
        """Sizes for padded prompts and new tokens; `needed` tokens are really in the longest row."""
        ...

    def start(self, params: Any, tokens: Array, lengths: Array, plan: Plan) -> tuple[Any, Array, KVCache, Array]:
        """Context, logits of the first new token [B, V], cache, and that token's position [B]."""
        ...

    def step(
        self, params: Any, context: Any, cache: KVCache, tokens: Array, positions: Array, plan: Plan, attended: int
    ) -> tuple[Array, KVCache]:
        """Appends one token per row; logits [B, V] of the next."""
        ...

    def extend(
        self, params: Any, context: Any, cache: KVCache, tokens: Array, positions: Array, plan: Plan
    ) -> tuple[Array, KVCache]:
        """Appends T tokens per row at positions of their own; logits [B, T, V] after each."""
        ...

    def history(self, tokens: Array, lengths: Array) -> tuple[Array, Array]:
        """Tokens [B, T] that count as said before the first new one, and which of them are real."""
        ...

    def lookup(self, tokens: Array, lengths: Array, new: Array, counts: Array) -> tuple[Array, Array, Array, Array]:
        """Where drafts are looked up [B, W], its lengths; what has been said, whose end is looked for, its lengths."""
        ...

    def full_logits(
        self, params: Any, tokens: Array, lengths: Array, new: Array, *, length: int | None = None
    ) -> Float[Array, "B N V"]:
        """Logits that predict each of `new` [B, N] after the prompts, by one forward of the training model."""
        ...


# Methods that an override may change without changing what is generated.
_NOT_DECODED = {"lens"}


def check_methods(model: type, family: type) -> None:
    """Refuses a subclass with a method of its own in place of the family's: decoding does not call those.

    Raises:
        TypeError: naming the methods.
    """
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
            f"cannot decode with {names}: decoding has functions of its own for {family.__name__} and would ignore it; "
            f"use score or model.apply, which call it, or generate with a plain {family.__name__}"
        )


def by_blocks(model: Any) -> Any:
    """The model with attention that no library can refuse."""
    return model.clone(config=replace(model.config, attention="chunked"))


def check_prepared(model: Model, embed: Array, layers: dict[str, int], depths: dict[str, int]) -> None:
    """Refuses parameters in the decoding layout of another model, as far as depths and embedding show it.

    Raises:
        ValueError: with what was found and what the config has.
    """
    c = model.config
    if layers != depths or embed.shape != (c.vocab_size, c.d_model):
        raise ValueError(
            f"the prepared parameters are not those of the model: layers {layers}, embedding {embed.shape}; the config "
            f"has {depths} and {(c.vocab_size, c.d_model)}"
        )


def join(tokens: Array, lengths: Array, new: Array) -> Int[Array, "B W"]:
    """Each prompt and right after it its new tokens."""
    columns = lengths[:, None] + jnp.arange(new.shape[1])
    joined = jnp.pad(tokens, ((0, 0), (0, new.shape[1])))
    return joined.at[jnp.arange(tokens.shape[0])[:, None], columns].set(new)
