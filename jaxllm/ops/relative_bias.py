"""T5's relative position bias: one learned number per head and bucket of distances (arXiv 1910.10683 section 2.1).

Buckets are computed on the host, in integers: the logarithm of T5's rule may put a border one distance off on another
platform. A bias depends on the distance alone. So the table is multiplied by one-hot rows of the T + S distances around
zero, and row t of [N, T, S] is a slice of the result. The gradient is a sum and a small matmul, not a scatter of T * S
terms. Out of scope: attention, which adds the bias to its scores.
"""

import bisect
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxllm.ops import backend


def relative_bucket(distance: np.ndarray, *, buckets: int, max_distance: int, bidirectional: bool) -> np.ndarray:
    """The bucket of each distance (key index minus query index).

    With `bidirectional`, half of the buckets are for keys after the query; else those share bucket 0. A direction has b
    buckets. The first m = b // 2 hold one distance each. Bucket m + j starts at the first n with
    n >= m * (max_distance / m) ** (j / (b - m)).
    """
    if bidirectional:
        buckets //= 2
        offset, n = np.where(distance > 0, buckets, 0), np.abs(distance)
    else:
        offset, n = np.zeros_like(distance), np.maximum(-distance, 0)
    starts = np.array(_bucket_starts(buckets, max_distance))
    return (offset + np.searchsorted(starts, n, side="right") - 1).astype(np.int32)


@functools.cache
def _bucket_starts(buckets: int, max_distance: int) -> tuple[int, ...]:
    """First distance of each bucket of one direction, by the rule without logarithm or root."""
    exact = buckets // 2
    wide = buckets - exact

    def first(j: int) -> int:
        # The smallest n with n^wide >= exact^wide * (max_distance / exact)^j, both sides times exact^j.
        bound, distances = exact**wide * max_distance**j, range(exact, max_distance)
        return exact + bisect.bisect_left(distances, bound, key=lambda n: n**wide * exact**j)

    return (*range(exact), *(first(j) for j in range(wide)))


def relative_bias(
    table: Float[Array, "R N"], *, queries: int, keys: int, max_distance: int, bidirectional: bool, dtype: Any = None
) -> Float[Array, "1 N T S"]:
    """The bias of every query and key of two sequences that share their first index, in float32 or `dtype`."""
    distance = np.arange(-queries, keys)
    bucket = relative_bucket(distance, buckets=table.shape[0], max_distance=max_distance, bidirectional=bidirectional)
    numbers = _rows(table, bucket).T
    bias: Any = _lay_out(numbers if dtype is None else numbers.astype(dtype), queries, keys)
    return bias[None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _lay_out(numbers: Float[Array, "N W"], queries: int, keys: int) -> Float[Array, "N T S"]:
    """Row t is the S of W numbers (distances -T .. S - 1) from -t on."""
    # Slices are written once; XLA:CPU would fuse reshapes into the softmax of every layer.
    # Figure: 1.04 times the processor time without, for two layers' softmax.
    # Seen: jaxlib 0.10.2. Shown by: row `slices of a bias`.
    heads, width = numbers.shape
    starts = width * jnp.arange(heads)[:, None] + queries - jnp.arange(queries)
    row = functools.partial(jax.lax.dynamic_slice_in_dim, numbers.reshape(-1), slice_size=keys)
    return jax.vmap(jax.vmap(row))(starts)


def _lay_out_backward(queries: int, keys: int, saved: None, grad: Array) -> tuple[Array]:
    # Row T - 1 - t holds distance d in column d + t: rows of W, read again as rows of W - 1, move by one place each.
    heads, width = grad.shape[0], queries + keys
    flat = jnp.pad(grad[:, ::-1], ((0, 0), (0, 0), (0, queries))).reshape(heads, -1)
    columns = flat[:, : queries * (width - 1)].reshape(heads, queries, width - 1)
    total = backend.sum_by_matmul(columns, axis=1)
    return (jnp.pad(total, ((0, 0), (1, 0))).astype(grad.dtype),)


_lay_out.defvjp(lambda numbers, queries, keys: (_lay_out(numbers, queries, keys), None), _lay_out_backward)


def relative_bias_at(
    table: Float[Array, "R N"], queries: Int[Array, "B T"], keys: Int[Array, "B S"], *, max_distance: int, capacity: int
) -> Float[Array, "B N T S"]:
    """The causal bias between given positions below `capacity`, in float32, for decoding from a cache.

    Keys after the query and empty slots get meaningless numbers. The caller masks them.
    """
    bucket = relative_bucket(
        -np.arange(capacity), buckets=table.shape[0], max_distance=max_distance, bidirectional=False
    )
    by_distance = _rows(table, bucket)  # [capacity, N]
    distance = jnp.clip(queries[:, :, None] - keys[:, None], 0, capacity - 1)
    return jnp.einsum("btsn->bnts", by_distance[distance])


def _rows(table: Float[Array, "R N"], bucket: np.ndarray) -> Float[Array, "W N"]:
    wide = jnp.promote_types(table.dtype, jnp.float32)
    hot = jnp.asarray(bucket[:, None] == np.arange(table.shape[0]), wide)
    return jnp.dot(hot, table.astype(wide), precision=jax.lax.Precision.HIGHEST)
