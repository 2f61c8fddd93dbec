"""From logits to a token: the processors of transformers, in its order and with its tie rules, then a draw.

Repetition penalty and the ban on end tokens act on greedy choices too. Temperature, top-k, top-p and min-p act on
samples, each on the result of the previous one. Each row has a separate key, so its sample does not depend on the rest
of the batch. Out of scope: when to stop.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxllm.config.setting import above, at_least, at_most, require, settings
from jaxllm.ops import backend

_SMALLEST, _LARGEST = 1e-30, 1e30  # by which logits can be divided or multiplied without leaving float32


@settings
class Sampling:
    """How tokens are chosen; hashable, so that it can be a static argument.

    Raises:
        ValueError: for a number out of its range, or top_k, top_p or min_p with a temperature of 0.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxllm.ops.sampling import Sampling, sample
        >>> logits = jnp.array([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])
        >>> sample(logits, jax.random.key(0), Sampling()).tolist()
        [1, 0]
        >>> sample(logits, jax.random.key(0), Sampling(temperature=0.8, top_k=1)).tolist()
        [1, 0]
    """

    temperature: Annotated[float, at_least(0), "divides the logits; 0 is greedy"] = 0.0
    top_k: Annotated[int | None, at_least(1), "keep the k largest logits and their ties; None keeps all"] = None
    top_p: Annotated[float, above(0), at_most(1), "keep the smallest set of probability p; 1 keeps all"] = 1.0
    min_p: Annotated[float, at_least(0), at_most(1), "least fraction of the largest probability; 0 keeps all"] = 0.0
    repetition_penalty: Annotated[
        float,
        at_least(_SMALLEST),
        at_most(_LARGEST),
        "divides positive logits of tokens already in the row, multiplies negative ones; 1 turns it off",
    ] = 1.0
    no_repeat_ngram_size: Annotated[
        int, at_least(0), "a row has no n-gram of so many tokens twice, its prompt included; 0 allows all"
    ] = 0
    min_new_tokens: Annotated[int, at_least(0), "end tokens are impossible before so many new tokens"] = 0

    def __post_init__(self) -> None:
        usable = self.temperature == 0 or _SMALLEST <= self.temperature <= _LARGEST
        message = f"temperature must be 0 (greedy) or in [{_SMALLEST}, {_LARGEST}], got {self.temperature}"
        require(usable, message)
        filtered = self.top_k is not None or self.top_p < 1 or self.min_p > 0
        message = "top_k, top_p and min_p choose among samples; set a temperature above 0"
        require(self.temperature > 0 or not filtered, message)


GREEDY = Sampling()


def process(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    *,
    seen: Bool[Array, "B V"] | None = None,
    banned: Bool[Array, "#B V"] | None = None,
) -> Float[Array, "B V"]:
    """Float32 logits after all processors; a sample is drawn from their softmax.

    `seen` are the tokens already in the row, for a repetition penalty. `banned` are tokens that must not come now: the
    end tokens of a row that is too short, or those that would complete an n-gram of the row again.
    """
    logits = logits.astype(jnp.float32)
    if seen is not None:
        logits = penalise_repetition(logits, seen, sampling.repetition_penalty)
    if banned is not None:
        logits = jnp.where(banned, -jnp.inf, logits)
    if sampling.temperature == 0:
        return logits
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p > 0:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


def choose(logits: Float[Array, "B V"], keys: Array, sampling: Sampling) -> Int[Array, " B"]:
    """One token per row from processed logits; row i draws with keys[i]."""
    return backend.fast_argmax(logits) if sampling.temperature == 0 else draw(logits, keys)


def draw(logits: Float[Array, "B V"], keys: Array) -> Int[Array, " B"]:
    """One id per row with the probabilities softmax(logits): the largest of logits + Gumbel noise."""
    noise = jax.vmap(lambda key: _gumbel(jax.random.bits(key, logits.shape[-1:], jnp.uint32)))(keys)
    return backend.fast_argmax(logits + noise)


def _gumbel(bits: UInt[Array, "*B"]) -> Float[Array, "*B"]:
    """-log(-log(1 - v)) of v = bits / 2^32.

    jax.random.gumbel takes 23 bits and cannot exceed 16. Tokens of a probability below 1e-7 would come at a third of
    their rate or never; in a large vocabulary they add up to several per cent. v counts from 0, where floating-point
    numbers are dense, so that all 32 bits have an effect.
    """
    v = (bits.astype(jnp.float32) + 0.5) * 2.0**-32
    return -jnp.log(-jnp.log1p(-jnp.minimum(v, 1 - 2.0**-24)))


def sample(logits: Float[Array, "B V"], key: Array, sampling: Sampling) -> Int[Array, " B"]:
    """One token id per row of raw logits, without a history."""
    return choose(process(logits, sampling), jax.random.split(key, logits.shape[0]), sampling)


def penalise_repetition(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: float) -> Float[Array, "B V"]:
    """Makes each token in `seen` less likely once, however often it occurred (arXiv 1909.05858)."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


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


def keep_min_p(logits: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
    """-inf where the probability is below p times the largest one."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    least = p * jnp.max(probabilities, axis=-1, keepdims=True)
    return jnp.where(probabilities < least, -jnp.inf, logits)
