"""Keys of random draws for a device's rows of a batch, so that all devices draw what a single one would.

A key holds the number of this device's part of the rows. A draw [B, ...] is then rows B * part to B * part + B of what
one device would draw for all parts, because threefry hashes each element's place on its own
(`jax_threefry_partitionable`, jax's default). Models split keys and draw from them as on one device.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import random as extend
from jaxtyping import Array, Int

_THREEFRY = "threefry2x32"


def row_keys(keys: Array, part: Int[Array, "*B"], *, parts: int) -> Array:
    """The keys of a part of the rows; of other generators than jax's default, other keys for each part."""
    if str(jax.random.key_impl(keys)) != _THREEFRY:
        return jnp.vectorize(jax.random.fold_in)(keys, part)
    words = jnp.concatenate([jax.random.key_data(keys), part[..., None].astype(jnp.uint32)], axis=-1)
    return jax.random.wrap_key_data(words, impl=_generator(parts))


@functools.cache
def _generator(parts: int) -> Any:
    """Threefry with the number of a part, out of so many, as the last word of its keys."""

    def derived(of_plain: Any, key: Array, *what: Any) -> Array:
        plain = jax.random.key_data(of_plain(jax.random.wrap_key_data(key[:2], impl=_THREEFRY), *what))
        return jnp.concatenate([plain, jnp.broadcast_to(key[2], (*plain.shape[:-1], 1))], axis=-1)

    def draw(key: Array, bits: int, shape: tuple[int, ...]) -> Array:
        rows, size = (*shape, 1)[0], math.prod(shape[1:])
        places = np.arange(rows * parts, dtype=np.uint64) * np.uint64(size)  # of each row's first element
        high, low = (jax.lax.dynamic_slice(jnp.asarray(x), (key[2] * rows,), (rows,))[:, None] for x in _words(places))
        inside = jax.lax.iota(jnp.uint32, size)
        low += inside
        high += low < inside
        first, second = (x.reshape(shape) for x in extend.threefry2x32_p.bind(key[0], key[1], high, low))
        if bits == 64:
            return first.astype(jnp.uint64) << 32 | second
        return (first ^ second).astype(f"uint{bits}")

    functions: Any = {"split": functools.partial(derived, jax.random.split), "random_bits": draw}
    functions |= {"fold_in": functools.partial(derived, jax.random.fold_in), "seed": lambda _: jnp.zeros(3, jnp.uint32)}
    return extend.define_prng_impl(key_shape=(3,), **functions)


def _words(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (places >> np.uint64(32)).astype(np.uint32), places.astype(np.uint32)
