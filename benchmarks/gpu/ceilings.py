"""What the device can do at most: a large matrix product and a large copy, on random numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks.gpu.common import report, spread, time_groups


def main(case: str, *, toy: bool) -> None:
    """Measures and reports one of `matmul` and `copy`."""
    groups, size = (1, 1) if toy else (10, 10)
    if case == "matmul":
        side = 64 if toy else 8192
        a, b = (jax.random.normal(jax.random.key(i), (side, side), jnp.bfloat16) for i in (0, 1))
        step, work, unit = jax.jit(jnp.matmul), 2 * side**3, "tflops"
    else:
        a = jax.random.normal(jax.random.key(0), (2**10 if toy else 2**31,), jnp.bfloat16)
        b = jnp.bfloat16(1)
        step, work, unit = jax.jit(jnp.add), 2 * a.nbytes, "terabytes_per_second"

    def run(count: int) -> None:
        for _ in range(count):
            out = step(a, b)
        jax.block_until_ready(out)

    run(3)
    times = spread(time_groups(run, groups=groups, size=size))
    report("ceilings", case, seconds=times, **{unit: work / times["median"] / 1e12})
