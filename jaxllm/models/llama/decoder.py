"""Llama's side of the decoding loops: a decoder continues its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllm.models.cache import KVCache
from jaxllm.models.decoder import Plan, by_blocks, check_methods, check_prepared, join
from jaxllm.models.layers import apply
from jaxllm.models.llama import Llama
from jaxllm.models.llama import decode as llama_decode
from jaxllm.models.params import check_params


@dataclass(frozen=True)
class LlamaDecoder:
    """A decoder continues its prompt."""

    model: Llama

    def without_cudnn(self) -> LlamaDecoder:
        """See `Decoder`."""
        return LlamaDecoder(by_blocks(self.model))

    def prepare(self, params: Any, *, int8: bool = False) -> llama_decode.LlamaParams:
        """See `Decoder`."""
        check_methods(type(self.model), Llama)
        if isinstance(params, llama_decode.LlamaParams):
            depths = {"decoder": self.model.config.num_layers}
            check_prepared(self.model, params.embed, {"decoder": len(params.layers)}, depths)
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
            self.model, params, tokens, lengths, capacity=plan.slots, length=plan.length, dtype=dtype
        )
        return None, logits, cache, lengths

    def step(
        self, params: Any, context: Any, cache: KVCache, tokens: Array, positions: Array, plan: Plan, attended: int
    ) -> tuple[Array, KVCache]:
        """See `Decoder`."""
        options = {"length": plan.length, "attended": attended}
        return llama_decode.decode_step(self.model, params, cache, tokens, positions, **options)

    def extend(
        self, params: Any, context: Any, cache: KVCache, tokens: Array, positions: Array, plan: Plan
    ) -> tuple[Array, KVCache]:
        """See `Decoder`."""
        return llama_decode.extend(self.model, params, cache, tokens, positions, length=plan.length)

    def history(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]
    ) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
        """See `Decoder`: the prompt."""
        return tokens, jnp.arange(tokens.shape[1])[None] < lengths[:, None]

    def lookup(self, tokens: Array, lengths: Array, new: Array, counts: Array) -> tuple[Array, Array, Array, Array]:
        """See `Decoder`: the row itself, prompt and new tokens."""
        joined = join(tokens, lengths, new)
        return joined, lengths + counts, joined, lengths + counts

    def full_logits(
        self, params: Any, tokens: Array, lengths: Array, new: Array, *, length: int | None = None
    ) -> Float[Array, "B N V"]:
        """See `Decoder`."""
        columns = lengths[:, None] + jnp.arange(new.shape[1])
        joined = join(tokens, lengths, new)
        hidden = apply(self.model, params, joined, length=length, method="hidden")
        before = jnp.take_along_axis(hidden, columns[..., None] - 1, axis=1)
        return apply(self.model, params, before, method="logits")
