"""T5's side of the decoding loops: an encoder-decoder answers its prompt, from the decoder's start token on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllm.models.cache import KVCache
from jaxllm.models.decoder import Plan, by_blocks, check_methods, check_prepared
from jaxllm.models.layers import apply
from jaxllm.models.params import check_params
from jaxllm.models.t5 import T5
from jaxllm.models.t5 import decode as t5_decode


@dataclass(frozen=True)
class T5Decoder:
    """An encoder-decoder answers its prompt, beginning with the decoder's start token."""

    model: T5

    def without_cudnn(self) -> T5Decoder:
        """See `Decoder`."""
        return T5Decoder(by_blocks(self.model))

    def prepare(self, params: Any, *, int8: bool = False) -> t5_decode.T5Params:
        """See `Decoder`."""
        check_methods(type(self.model), T5)
        if isinstance(params, t5_decode.T5Params):
            c = self.model.config
            layers = {"encoder": len(params.encoder.layers), "decoder": len(params.decoder.layers)}
            depths = {"encoder": c.num_layers, "decoder": c.num_decoder_layers}
            check_prepared(self.model, params.embed, layers, depths)
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
        dtype = jnp.dtype(plan.cache_dtype) if plan.cache_dtype else None
        cross, cache = t5_decode.prefill(self.model, params, tokens, lengths, capacity=plan.slots, dtype=dtype)
        zeros = jnp.zeros_like(lengths)
        start = zeros + self.model.config.decoder_start_id
        logits, cache = t5_decode.decode_step(self.model, params, cross, cache, start, zeros, attended=1)
        return cross, logits, cache, zeros + 1

    def step(
        self, params: Any, context: Any, cache: KVCache, tokens: Array, positions: Array, plan: Plan, attended: int
    ) -> tuple[Array, KVCache]:
        """See `Decoder`."""
        return t5_decode.decode_step(self.model, params, context, cache, tokens, positions, attended=attended)

    def extend(
        self, params: Any, context: Any, cache: KVCache, tokens: Array, positions: Array, plan: Plan
    ) -> tuple[Array, KVCache]:
        """See `Decoder`."""
        return t5_decode.extend(self.model, params, context, cache, tokens, positions)

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
