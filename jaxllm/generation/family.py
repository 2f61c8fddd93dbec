"""What the decoding loops need of a model family, and nothing else of it: one small adapter per family.

An adapter is a hashable value around a model, so that it can be a static argument. `context` is what a generation
keeps besides the cache: nothing for a decoder, the encoder's keys and values for an encoder-decoder. It is closed over
by the loops, never carried, so that it is neither copied nor mistaken for another batch's.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllm.models import Model, check_model, check_params, llama_decode, t5_decode
from jaxllm.models.cache import KVCache
from jaxllm.models.layers import apply
from jaxllm.models.llama import Llama
from jaxllm.models.t5 import T5


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


@dataclass(frozen=True)
class LlamaDecoder:
    """A decoder continues its prompt."""

    model: Llama

    def without_cudnn(self) -> LlamaDecoder:
        """See `Decoder`."""
        return LlamaDecoder(_by_blocks(self.model))

    def prepare(self, params: Any, *, int8: bool = False) -> llama_decode.LlamaParams:
        """See `Decoder`."""
        _check_methods(type(self.model), Llama)
        if isinstance(params, llama_decode.LlamaParams):
            _check_prepared(self.model, params.embed, decoder=len(params.layers))
            return params
        check_params(self.model, params)
        return llama_decode.prepare_for_decode(params, dtype=self.model.dtype, int8=int8)

    def check(self, prompts: Sequence[Sequence[int]], *, new: int, pad_id: int) -> None:
        """See `Decoder`; positions beyond the context only exist where dynamic scaling makes them."""
        c = self.model.config
        worst = max(range(len(prompts)), key=lambda i: len(prompts[i]))
        longest = len(prompts[worst])
        context = int(c.max_length * (c.rope.factor or 1)) if c.rope.type == "dynamic" else c.max_length
        if longest + new - 1 > context:
            raise ValueError(
                f"prompt {worst} of {longest} tokens and {new} new ones need {longest + new - 1} positions, the "
                f"model's context has {context} (model.max_length); shorten the prompt or max_new_tokens"
            )

    def plan(self, *, prompt: int, new: int, needed: int, cache_dtype: str | None, wraps: bool) -> Plan:
        """See `Decoder`."""
        c = self.model.config
        slots = prompt + new
        if wraps and c.sliding_window is not None:
            slots = min(slots, c.sliding_window)
        # Only these two let the length change the frequencies; others share one compiled program.
        length = needed if c.rope.type in ("dynamic", "longrope") else c.max_length
        return Plan(prompt, new, prompt, slots, length, cache_dtype)

    def start(self, params: Any, tokens: Array, lengths: Array, plan: Plan) -> tuple[Any, Array, KVCache, Array]:
        """See `Decoder`."""
        dtype = jnp.dtype(plan.cache_dtype) if plan.cache_dtype else None
        logits, cache = llama_decode.prefill(
            self.model.config, params, tokens, lengths, capacity=plan.slots, length=plan.length, dtype=dtype
        )
        return None, logits, cache, lengths

    def step(
        self, params: Any, context: Any, cache: KVCache, tokens: Array, positions: Array, plan: Plan, attended: int
    ) -> tuple[Array, KVCache]:
        """See `Decoder`."""
        config = self.model.config
        return llama_decode.decode_step(config, params, cache, tokens, positions, length=plan.length, attended=attended)

    def extend(
        self, params: Any, context: Any, cache: KVCache, tokens: Array, positions: Array, plan: Plan
    ) -> tuple[Array, KVCache]:
        """See `Decoder`."""
        return llama_decode.extend(self.model.config, params, cache, tokens, positions, length=plan.length)

    def history(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
    ) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
        """See `Decoder`: the prompt."""
        return tokens, jnp.arange(tokens.shape[1])[None] < lengths[:, None]

    def lookup(self, tokens: Array, lengths: Array, new: Array, counts: Array) -> tuple[Array, Array, Array, Array]:
        """See `Decoder`: the row itself, prompt and new tokens."""
        joined = _join(tokens, lengths, new)
        return joined, lengths + counts, joined, lengths + counts

    def full_logits(
        self, params: Any, tokens: Array, lengths: Array, new: Array, *, length: int | None = None
    ) -> Float[Array, "B N V"]:
        """See `Decoder`."""
        columns = lengths[:, None] + jnp.arange(new.shape[1])
        joined = _join(tokens, lengths, new)
        hidden = apply(self.model, params, joined, length=length, method="hidden")
        before = jnp.take_along_axis(hidden, columns[..., None] - 1, axis=1)
        return apply(self.model, params, before, method="logits")


@dataclass(frozen=True)
class T5Decoder:
    """An encoder-decoder answers its prompt, beginning with the decoder's start token."""

    model: T5

    def without_cudnn(self) -> T5Decoder:
        """See `Decoder`."""
        return T5Decoder(_by_blocks(self.model))

    def prepare(self, params: Any, *, int8: bool = False) -> t5_decode.T5Params:
        """See `Decoder`."""
        _check_methods(type(self.model), T5)
        if isinstance(params, t5_decode.T5Params):
            encoder, decoder = len(params.encoder.layers), len(params.decoder.layers)
            _check_prepared(self.model, params.embed, encoder=encoder, decoder=decoder)
            return params
        check_params(self.model, params)
        return t5_decode.prepare_for_decode(params, dtype=self.model.dtype, int8=int8)

    def check(self, prompts: Sequence[Sequence[int]], *, new: int, pad_id: int) -> None:
        """See `Decoder`; relative positions have no longest context, but padding alone is no input."""
        for i, prompt in enumerate(prompts):
            if all(token == pad_id for token in prompt):
                raise ValueError(f"prompt {i} holds only padding (id {pad_id}): the encoder would see nothing")

    def plan(self, *, prompt: int, new: int, needed: int, cache_dtype: str | None, wraps: bool) -> Plan:
        """See `Decoder`: only the start token precedes the new ones in the cache."""
        return Plan(prompt, new, 1, 1 + new, None, cache_dtype)

    def start(self, params: Any, tokens: Array, lengths: Array, plan: Plan) -> tuple[Any, Array, KVCache, Array]:
        """See `Decoder`."""
        c = self.model.config
        dtype = jnp.dtype(plan.cache_dtype) if plan.cache_dtype else None
        cross, cache = t5_decode.prefill(c, params, tokens, lengths, capacity=plan.slots, dtype=dtype)
        zeros = jnp.zeros_like(lengths)
        logits, cache = t5_decode.decode_step(c, params, cross, cache, zeros + c.decoder_start_id, zeros, attended=1)
        return cross, logits, cache, zeros + 1

    def step(
        self, params: Any, context: Any, cache: KVCache, tokens: Array, positions: Array, plan: Plan, attended: int
    ) -> tuple[Array, KVCache]:
        """See `Decoder`."""
        return t5_decode.decode_step(self.model.config, params, context, cache, tokens, positions, attended=attended)

    def extend(
        self, params: Any, context: Any, cache: KVCache, tokens: Array, positions: Array, plan: Plan
    ) -> tuple[Array, KVCache]:
        """See `Decoder`."""
        return t5_decode.extend(self.model.config, params, context, cache, tokens, positions)

    def history(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
    ) -> tuple[Int[Array, "B 1"], Bool[Array, "B 1"]]:
        """See `Decoder`: the start token, not the encoder's input."""
        begun = jnp.full((tokens.shape[0], 1), self.model.config.decoder_start_id, jnp.int32)
        return begun, jnp.ones(begun.shape, bool)

    def lookup(self, tokens: Array, lengths: Array, new: Array, counts: Array) -> tuple[Array, Array, Array, Array]:
        """See `Decoder`: the encoder's input."""
        return tokens, lengths, new, counts

    def full_logits(
        self, params: Any, tokens: Array, lengths: Array, new: Array, *, length: int | None = None
    ) -> Float[Array, "B N V"]:
        """See `Decoder`."""
        begun = jnp.full((tokens.shape[0], 1), self.model.config.decoder_start_id, new.dtype)
        shifted = jnp.concatenate([begun, new[:, :-1]], axis=1)
        return apply(self.model, params, tokens, shifted, encoder_lengths=lengths)


# Methods that an override may change without changing what is generated.
_NOT_DECODED = {"lens"}


def _check_methods(model: type, family: type) -> None:
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


def _by_blocks(model: Any) -> Any:
    return model.clone(config=replace(model.config, attention="chunked"))


def _check_prepared(model: Model, embed: Array, **layers: int) -> None:
    """What a layout can show of another model's."""
    c = model.config
    depths = {"decoder": c.num_layers}
    if c.family == "t5":
        depths = {"encoder": c.num_layers, "decoder": c.num_decoder_layers}
    if layers != depths or embed.shape != (c.vocab_size, c.d_model):
        raise ValueError(
            f"the prepared parameters are not those of the model: layers {layers}, embedding {embed.shape}; the config "
            f"has {depths} and {(c.vocab_size, c.d_model)}"
        )


def _join(tokens: Array, lengths: Array, new: Array) -> Int[Array, "B W"]:
    """Each prompt and right after it its new tokens."""
    columns = lengths[:, None] + jnp.arange(new.shape[1])
    joined = jnp.pad(tokens, ((0, 0), (0, new.shape[1])))
    return joined.at[jnp.arange(tokens.shape[0])[:, None], columns].set(new)


def decoder_of(model: Model) -> Decoder:
    """The adapter of a model's family."""
    check_model(model)
    kind: Any = T5Decoder if model.config.encoder_decoder else LlamaDecoder
    return kind(model)
