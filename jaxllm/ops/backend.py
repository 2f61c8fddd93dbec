"""Every choice that depends on the platform, and every form written for one compiler.

A choice is made while a program is traced, for the default backend of the process. A function for one compiler states
what it does and why; `Figure`, a measurement; `Seen`, its jaxlib; and `Shown by`, a row of `benchmarks/workarounds.py`
or a test. A form without a choice has the same words in a comment at its place. Where a newer jaxlib shows no gain, the
function and the branches of its callers can go. The limits of cuDNN are in `jaxllm.ops.cudnn`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def on_gpu() -> bool:
    """Whether programs are made for a GPU."""
    return jax.default_backend() == "gpu"


def on_cpu() -> bool:
    """Whether programs are made for a CPU."""
    return jax.default_backend() == "cpu"


def gpu_generation() -> int | None:
    """Major compute capability, 9 for Hopper; 0 for a GPU that is not NVIDIA's, None for a device that is not a GPU."""
    capability = getattr(jax.devices()[0], "compute_capability", None)
    if capability is None:
        return None
    major = capability.split(".")[0]
    return int(major) if major.isdigit() else 0


def has_bfloat16() -> bool:
    """Whether the default device is a GPU with bfloat16 units: NVIDIA's from the Ampere generation on."""
    return on_gpu() and (gpu_generation() or 0) >= 8


def matmul_output(dtype: Any) -> Any:
    """The output dtype of a matmul whose float32 accumulator is rounded to `dtype` afterwards.

    A GPU accumulates in float32 for any output, and a float32 output would be written and read once more. XLA:CPU is
    slow at a 16-bit output.
    Figure: a 16-bit output takes 20 times as long on a CPU with AMX, 1.6 times on one without.
    Seen: jaxlib 0.10.2. Shown by: row `16-bit output`.
    """
    return dtype if on_gpu() else jnp.promote_types(dtype, jnp.float32)


_TRANSPOSED_ROWS = 8


def needs_explicit_transpose(left: Float[Array, "*B N D"]) -> bool:
    """Whether left^T @ right is faster with a transpose of `left` that the matmul cannot absorb.

    XLA:CPU multiplies in bfloat16 only where neither operand is transposed. Else it converts both to float32.
    Figure: such a matmul is 1.5 to 3 times as fast.
    Seen: jaxlib 0.10.2. Shown by: row `explicit transpose`.
    """
    low = jnp.promote_types(left.dtype, jnp.float32) != left.dtype
    return low and left.shape[-2] % _TRANSPOSED_ROWS == 0 and not on_gpu()


def explicit_transpose(x: Float[Array, "*B N D"]) -> Float[Array, "*B D N"]:
    """The transpose between two reshapes, which keep XLA from merging it into a matmul (`needs_explicit_transpose`)."""
    *batch, rows, width = x.shape
    groups = x.reshape(*batch, rows // _TRANSPOSED_ROWS, _TRANSPOSED_ROWS, width)
    return jnp.moveaxis(groups, -1, -3).reshape(*batch, width, rows)


def halves_sum(x: Float[Array, "*B D"], kernel: Float[Array, "D F"]) -> bool:
    """Whether one row times a matrix is faster as two matmuls, each over half of the sum.

    XLA:CPU then shares the reading of the matrix between cores. Larger matrices, or more rows, are faster whole.
    Figure: 1.5 times as fast for a few MB; a decoding step of one row is 1.2 to 1.4 times as fast.
    Seen: jaxlib 0.10.2. Shown by: row `half of the sum`.
    """
    return on_cpu() and x.size == len(kernel) and x.size % 2 == 0 and kernel.size <= 2**21


def stores_by_outputs(kernel: Float[Array, "D F"]) -> bool:
    """Whether decoding stores a matrix as [F, D], with its inputs last, where those are many.

    The layout is the same on all platforms, so that parameters prepared for decoding do not depend on one.
    Figure: with the longer axis last a CPU reads it 1.2 to 1.5 times as fast.
    Seen: jaxlib 0.10.2. Shown by: row `stored by outputs`.
    """
    return kernel.shape[0] > kernel.shape[1] or kernel.shape[0] >= 768


def multiplies_table_first() -> bool:
    """Whether x @ table^T is faster as (table @ x^T)^T, behind a barrier that keeps XLA from reordering it.

    Figure: 1.3 to 1.6 times as fast for 8 rows and a table of 8 MB.
    Seen: jaxlib 0.10.2. Shown by: row `table first`.
    """
    return on_cpu()


_BLOCK = 64


def fast_argmax(x: Float[Array, "*B V"]) -> Int[Array, "*B"]:
    """The index of the largest number, the first of equal ones; any valid index where there are NaNs.

    XLA:CPU's argmax is a scalar loop. The maximum of each block is vectorised, and two short argmaxes find its place.
    Figure: 10 times as fast on a CPU.
    Seen: jaxlib 0.10.2. Shown by: row `argmax by blocks`.
    """
    *batch, width = x.shape
    if not on_cpu() or width <= _BLOCK:
        return jnp.argmax(x, axis=-1).astype(jnp.int32)
    padded = jnp.pad(x, [(0, 0)] * len(batch) + [(0, -width % _BLOCK)], constant_values=-jnp.inf)
    blocks = padded.reshape(*batch, -1, _BLOCK)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    inside = jnp.argmax(jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :], axis=-1)
    return (block * _BLOCK + inside).astype(jnp.int32)


def largest_magnitude(x: Float[Array, "..."], *, axis: int | None) -> Float[Array, "..."]:
    """The largest |x| over an axis, or over all, NaN where there is one.

    XLA:CPU's maximum of a large array leaves NaNs out.
    Figure: a wrong answer, not a slow one.
    Seen: jaxlib 0.10.2. Shown by: tests/ops/test_backend.py, `test_xla_cpu_still_leaves_nan_out_of_a_maximum`.
    """
    return jnp.where(jnp.any(jnp.isnan(x), axis=axis), jnp.nan, jnp.max(jnp.abs(x), axis=axis))


def sum_by_matmul(x: Float[Array, "..."], axis: int, *, keepdims: bool = False) -> Float[Array, "..."]:
    """The sum over an axis that is not the last, in float32, as a matmul with ones.

    XLA:CPU is slow at reducing a major axis.
    Figure: jnp.sum takes 20 to 50 times as long on a CPU.
    Seen: jaxlib 0.10.2. Shown by: row `sum as a matmul`.
    """
    ones = jnp.ones((1, x.shape[axis]) if keepdims else x.shape[axis], x.dtype)
    axes = ((ones.ndim - 1,), (axis,)), ((), ())
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jax.lax.dot_general(ones, x, axes, precision=jax.lax.Precision.HIGHEST, preferred_element_type=wide)


def reduces_pairs() -> bool:
    """Whether a maximum and the sum of exponentials from it are computed in one reduction, which reads logits once.

    Figure: XLA:CPU takes 6 to 14 times as long for it as for two reductions (256 rows of 32,000, a busy machine).
    Seen: jaxlib 0.10.2. Shown by: row `two reductions`.
    """
    return on_gpu()


def norms_a_second_row(x: Float[Array, "*B D"]) -> bool:
    """Whether the norm of a single row is computed as the first of two.

    XLA's GPU compiler makes one kernel of a norm over several rows. For one row it makes two: a sum and the rest.
    Figure: a decoding step of one row takes 13 kernels a layer instead of 16, the caches' layout included.
    Seen: jaxlib 0.10.2 and 0.11.2. Shown by: tests/structure/test_gpu_programs.py, `test_decoding`.
    """
    return x.size == x.shape[-1] and on_gpu()


def joins_keys_and_values(batch: int) -> bool:
    """Whether a layer's cache is one array for keys and values, which a decoding step updates in one kernel.

    Several rows keep two arrays: XLA's fused softmax needs the keys of each row in one piece.
    Figure: a decoding step of one row takes 13 kernels a layer instead of 16 on a GPU, the norms' second row included.
    Seen: jaxlib 0.10.2 and 0.11.2. Shown by: tests/structure/test_gpu_programs.py, `test_decoding`.
    """
    return on_gpu() and batch == 1


def attends_by_matmul(*dtypes: Any) -> bool:
    """Whether one query per row attends to a cache of these dtypes by matmuls, instead of by multiply-and-sum.

    XLA fuses multiply-and-sum with the conversion of a narrow cache.
    Figure: a CPU reads a float32 cache 2 to 5 times as fast by matmuls.
    Seen: jaxlib 0.10.2. Shown by: row `attention to a cache by matmul`.
    """
    return on_cpu() and all(dtype == jnp.float32 for dtype in dtypes)


def attends_one_head_at_a_time(groups: int) -> bool:
    """Whether `attends_by_matmul` takes one matmul for each of the query heads of a key head.

    Figure: up to 1.8 times as fast for two query heads on a CPU.
    Seen: jaxlib 0.10.2. Shown by: row `attention head by head`.
    """
    return groups <= 2
