"""From logits to a token: temperature, top-k and top-p in transformers' order, or the largest."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen; hashable, so that it can be a static argument.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k largest logits and their ties; None keeps all.
        top_p: keep the smallest set of tokens whose probability reaches p; 1 keeps all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}; 0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}; null keeps all")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.temperature == 0 and (self.top_k is not None or self.top_p < 1):
            raise ValueError("top_k and top_p choose among samples; set a temperature above 0")


def sample(logits: Float[Array, "B V"], key: Array, sampling: Sampling) -> Int[Array, " B"]:
    """One token id per row."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def keep_top_k(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """-inf below the k-th largest; ties with it stay."""
    threshold = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits < threshold, -jnp.inf, logits)


def keep_top_p(logits: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """-inf outside the smallest set whose probability reaches p; the token that crosses p stays (1904.09751)."""
    order = jnp.argsort(logits, axis=-1)
    ascending = jnp.take_along_axis(logits, order, axis=-1)
    drop = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - p
    drop = drop.at[..., -1].set(False)
    back = jnp.take_along_axis(drop, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(back, -jnp.inf, logits)
