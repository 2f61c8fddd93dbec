"""A family that shares no class with Llama or T5: one layer that mixes tokens by weights that decay with distance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxllm.config.model import Attention, Layers, ModelConfig, Objective, Remat
from jaxllm.config.setting import at_least, settings
from jaxllm.models.cache import KVCache, init_cache, write
from jaxllm.models.decoder import Decoder, Plan
from jaxllm.models.family import Family
from jaxllm.models.layers import DEFAULT_ISLANDS, Islands, apply
from jaxllm.models.model import Flops


@settings
class ToyConfig(ModelConfig):
    """Settings of the toy; layers, remat and attention have no effect."""

    encoder_decoder: ClassVar[bool] = False
    objectives: ClassVar[tuple[Objective, ...]] = ("causal",)
    absent_islands: ClassVar[frozenset[str]] = frozenset({"rope", "softmax", "relative_bias", "mlp_output"})
    outgrows_float16: ClassVar[bool] = False
    metric: ClassVar[str] = "bits_per_byte"

    family: Annotated[Literal["toy"], "name of this family"] = "toy"
    vocab_size: Annotated[int, at_least(1), "rows of the embedding"]
    d_model: Annotated[int, at_least(1), "width of the residual stream"]
    num_layers: Annotated[int, "has one layer"] = 1
    layers: Layers = "unroll"
    remat: Remat = "none"
    attention: Attention = "auto"


class Toy(nn.Module):
    config: ToyConfig
    dtype: Any = jnp.float32
    islands: Islands = DEFAULT_ISLANDS

    def setup(self) -> None:
        c, draw = self.config, nn.initializers.normal(0.1)
        self.embed = self.param("embed", draw, (c.vocab_size, c.d_model), jnp.float32)
        self.mixer = self.param("mixer", draw, (c.d_model, c.d_model), jnp.float32)
        self.half_life = self.param("half_life", nn.initializers.ones, (), jnp.float32)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.logits(self.hidden(tokens))

    def hidden(self, tokens: jax.Array, *, length: Any = None) -> jax.Array:
        distance = jnp.arange(tokens.shape[1])[:, None] - jnp.arange(tokens.shape[1])
        return self.mix(tokens, self.values(tokens), distance[None])

    def values(self, tokens: jax.Array) -> jax.Array:
        with jax.named_scope("mixer"):
            return self.embed.astype(self.dtype)[tokens] @ self.mixer.astype(self.dtype)

    def mix(self, tokens: jax.Array, values: jax.Array, distance: jax.Array) -> jax.Array:
        decay = -jnp.maximum(distance, 0) / (1 + jnp.abs(self.half_life.astype(jnp.float32)))
        weights = jnp.where(distance >= 0, jnp.exp(decay), 0).astype(self.dtype)
        return self.embed.astype(self.dtype)[tokens] + jnp.einsum("bts,bsd->btd", weights, values)

    def logits(self, x: jax.Array) -> jax.Array:
        return jnp.einsum("btd,vd->btv", x, self.head(), preferred_element_type=jnp.float32)

    def head(self) -> jax.Array:
        return self.embed.astype(self.dtype)


def hidden(model: Any, params: Any, batch: Mapping[str, Any], key: Any = None) -> jax.Array:
    return apply(model, params, batch["tokens"], method="hidden")


def flops(c: ToyConfig, batch: int, length: int, target_length: int) -> Flops:
    weights = 6.0 * batch * length * c.d_model * (c.d_model + c.vocab_size)
    pairs = 6.0 * batch * length**2 * c.d_model
    return Flops(weights + pairs / 2, weights + pairs, weights)


class ToyDecoder(Decoder):
    """Keeps the values of earlier tokens in the cache of the other families."""

    def start(self, params: Any, tokens: Any, lengths: Any, plan: Plan) -> tuple[Any, jax.Array, KVCache, jax.Array]:
        c, (batch, count) = self.model.config, tokens.shape
        cache = init_cache(
            batch=batch, capacity=plan.slots, num_layers=1, num_kv_heads=1, head_dim=c.d_model, dtype=self.model.dtype
        )
        states = apply(self.model, params, tokens, method="hidden")
        last = jnp.take_along_axis(states, (lengths - 1)[:, None, None], axis=1)
        values = apply(self.model, params, tokens, method="values")[:, :, None]
        index = jnp.arange(count, dtype=jnp.int32)[None]
        seen = cache.positions.at[:, :count].set(jnp.where(index < lengths[:, None], index, -1))
        held = write(cache.values[0], values, cache.slot)
        cache = KVCache(cache.keys, (held,), seen, jnp.asarray(count, jnp.int32))
        return None, apply(self.model, params, last, method="logits")[:, 0], cache, lengths

    def step(
        self, params: Any, context: Any, cache: KVCache, tokens: Any, positions: Any, plan: Plan, attended: int
    ) -> tuple[jax.Array, KVCache]:
        seen = jax.lax.dynamic_update_slice_in_dim(cache.positions, positions[:, None], cache.slot, axis=1)
        new = apply(self.model, params, tokens[:, None], method="values")[:, :, None]
        held = write(cache.values[0], new, cache.slot)
        distance = jnp.where(seen >= 0, positions[:, None] - seen, -1)[:, None]
        states = apply(self.model, params, tokens[:, None], held, distance, method="mix")
        return apply(self.model, params, states, method="logits")[:, 0], KVCache(
            cache.keys, (held,), seen, cache.slot + 1
        )


TOY = Family(Toy, hidden, flops, ToyDecoder)
