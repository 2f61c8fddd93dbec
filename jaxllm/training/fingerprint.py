"""64 bits per array of a tree, which change when any bit of it does: what a checkpoint is verified by.

Each element's bits, as 32-bit words x_i, enter two sums modulo 2^32:

    h_i = mix(x_i XOR i * m)     mix: MurmurHash3's last step, a bijection; m odd
    s = (sum_i h_i, sum_i (2 i + 1) * h_i)

A changed word changes its h and 2 i + 1 has an inverse, so a change of a single word always changes both sums. Swapped
elements and other changes of several words go unseen with a probability of about 2^-64. (Without `mix`, two flipped
signs would cancel: 2^31 + 2^31 = 0.) Sums of integers do not depend on their order, so a fingerprint is the same on
any number of devices. It costs one read of the tree.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from jaxllm.training.sharding import fetch


@jax.jit
def fingerprints(tree: Any) -> UInt32[Array, "R 2"]:
    """Two sums for each of the R leaves of a tree of arrays, in the order of `jax.tree.leaves`.

    >>> swapped = fingerprints([jnp.array([2.0, 1.0])]) != fingerprints([jnp.array([1.0, 2.0])])
    >>> bool(swapped.all())
    True
    """
    return jnp.stack([_sums(leaf) for leaf in jax.tree.leaves(tree)])


def named_fingerprints(tree: Any) -> dict[str, str]:
    """16 hexadecimal digits by path, such as params/embed, of a tree of arrays on any devices; waits for them."""
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    sums = fetch(fingerprints(tree))
    return {path: f"{int(first):08x}{int(second):08x}" for path, (first, second) in zip(paths, sums, strict=True)}


def total(named: dict[str, str]) -> str:
    """16 hexadecimal digits for all leaves together, whatever their order."""
    return hashlib.sha256("\n".join(map(" ".join, sorted(named.items()))).encode()).hexdigest()[:16]


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's path as text: keys, attributes and indices, separated by slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


@jax.jit  # leaves of one shape and dtype are traced once
def _sums(leaf: Array) -> UInt32[Array, " 2"]:
    words = _words(leaf)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    mixed = _mix(words ^ (position * jnp.uint32(0x9E3779B1)))
    terms = mixed, mixed * (2 * position + 1)
    # One reduction of pairs: XLA:CPU takes 10 times as long for two sums (jaxlib 0.10.2).
    return jnp.stack(jax.lax.reduce(terms, (jnp.uint32(0),) * 2, _add_pairs, tuple(range(words.ndim))))


def _add_pairs(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    return a[0] + b[0], a[1] + b[1]


def _words(leaf: Array) -> UInt32[Array, "..."]:
    """The bits of each element as 32-bit words: a narrower element fills the lower bits of one, a wider one two."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
