"""The gain of each form of `jaxllm.ops.backend` on this CPU, and so whether it is still needed.

    python -m benchmarks.workarounds [--turns 9] [ROW ...]

Each row runs two programs that compute the same, with the form and without it, in turns in one process, because a
machine's speed drifts. A ratio is the time without over the time with, within a turn; the table has its median and
range, and the ratio of each side's fastest turn. A form can go when neither is above 1 with a newer jaxlib. What serves
a GPU is shown by tests/structure.
"""

import argparse
import functools
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import spread
from benchmarks.sides import processor
from jaxllm.ops import backend, losses, positions
from jaxllm.ops.linear import linear, sum_of_outer
from jaxllm.ops.stored import Rows, project

_SECONDS = 0.04  # of one timing, at least


class Row(NamedTuple):
    """Two programs of the same arguments."""

    arguments: tuple[jax.Array, ...]  # of both
    form: Callable[..., Any]  # the program with the form
    # the program without; None is `form` while the choice named next gives the other answer
    plain: Callable[..., Any] | None = None
    replaced: str = ""  # a choice of `jaxllm.ops.backend` that is made for these arguments


def normal(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    """Normal numbers, the same in every call."""
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32), dtype)


def matmuls() -> dict[str, Row]:
    """Forms of a single matmul, at the sizes of benchmarks.shapes A and B."""
    low, einsum = jnp.bfloat16, jnp.einsum
    x, kernel, grad = normal(2048, 256, dtype=low), normal(256, 688, dtype=low), normal(2048, 688, dtype=low)
    return {
        "16-bit output": Row((x, kernel), linear, functools.partial(jnp.matmul, preferred_element_type=low)),
        "explicit transpose": Row((x, grad), sum_of_outer, replaced="needs_explicit_transpose"),
        "half of the sum": Row((normal(1, 512), normal(512, 1376)), project, replaced="halves_sum"),
        "stored by outputs": Row(
            (normal(8, 1376), normal(512, 1376)),
            lambda x, table: project(x, Rows(table)),
            lambda x, table: project(x, table.reshape(1376, 512)),
        ),
        "table first": Row(
            (normal(8, 256), normal(8192, 256)),
            lambda x, table: project(x, Rows(table)),
            replaced="multiplies_table_first",
        ),
        "attention to a cache by matmul": Row(
            (normal(4, 8, 64), normal(4, 1024, 64)),
            lambda q, k: einsum("rsh,rgh->rsg", k, q),
            lambda q, k: jnp.sum(q[:, :, None] * k[:, None], axis=-1),
        ),
        "attention head by head": Row(
            (normal(32, 2, 64), normal(32, 2048, 64)),
            lambda q, k: jnp.stack([einsum("rsh,rh->rs", k, one) for one in jnp.unstack(q, axis=1)], axis=1),
            lambda q, k: jax.lax.optimization_barrier(einsum("rsh,rgh->rsg", k, q)).swapaxes(1, 2),
        ),
    }


def reductions() -> dict[str, Row]:
    """Forms of a reduction."""
    scores = normal(8, 8, 128, 512)
    return {
        "argmax by blocks": Row((normal(8, 32_000),), backend.fast_argmax, functools.partial(jnp.argmax, axis=-1)),
        "sum as a matmul": Row(
            (scores,), functools.partial(backend.sum_by_matmul, axis=0), functools.partial(jnp.sum, axis=0)
        ),
        "two reductions": Row((normal(256, 32_000),), losses._largest_and_sum, replaced="reduces_pairs"),
    }


def softmaxes() -> dict[str, Row]:
    """Forms of an attention's softmax, as jaxllm.ops.chunked_attention has it."""
    batch, groups, length, keys = 4, 2, 128, 512
    query, key = normal(batch, 4, groups, length, 64), normal(batch, 4, 64, keys)
    lowest = jnp.finfo(jnp.float32).min
    numbers = normal(8, length + keys)

    def weights(scores: jax.Array) -> jax.Array:
        largest = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), lowest / 2)
        found = jnp.exp(scores - largest)
        return found / jnp.maximum(jnp.sum(found, axis=-1, keepdims=True), 1)

    def selected(scores: jax.Array) -> jax.Array:
        found = jax.nn.softmax(scores, axis=-1)
        return jnp.where(jnp.max(scores, axis=-1, keepdims=True) > lowest, found, 0)

    def four(query: jax.Array, key: jax.Array) -> jax.Array:
        folded = query.reshape(batch, 4, groups * length, 64)
        return weights(jnp.einsum("bkqh,bkhs->bkqs", folded, key))

    def five(query: jax.Array, key: jax.Array) -> jax.Array:
        return weights(jnp.einsum("bkgth,bkhs->bkgts", query, key))

    def two_layers(scores: jax.Array, bias: jax.Array) -> jax.Array:
        return weights(scores + bias) + weights(2 * scores + bias)

    def gathered(numbers: jax.Array) -> jax.Array:
        return numbers[:, np.arange(keys) - np.arange(length)[:, None] + length]

    scores = normal(batch, 8, length, keys)
    return {
        "four axes": Row((query, key), four, five),
        "maxima": Row((scores,), weights, selected),
        "slices of a bias": Row(
            (scores, numbers),
            lambda scores, numbers: two_layers(scores, positions._lay_out(numbers, length, keys)),
            lambda scores, numbers: two_layers(scores, gathered(numbers)),
        ),
    }


ROWS = {**matmuls(), **reductions(), **softmaxes()}


def compiled(row: Row) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The programs with the form and without it."""

    def program(function: Callable[..., Any]) -> Callable[[], Any]:
        made = jax.jit(lambda *arguments: function(*arguments)).lower(*row.arguments).compile()
        return lambda: jax.block_until_ready(made(*row.arguments))

    form = program(row.form)
    if row.plain is not None:
        return form, program(row.plain)
    with mock.patch.object(backend, row.replaced, lambda *_: row.replaced == "reduces_pairs"):
        return form, program(row.form)


def seconds(run: Callable[[], Any]) -> float:
    """Seconds of one run."""
    count, before = 0, time.perf_counter()
    while (spent := time.perf_counter() - before) < _SECONDS:
        run()
        count += 1
    return spent / count


def main() -> None:
    """Times the rows and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; all without any")
    parser.add_argument("--turns", type=int, default=9)
    arguments = parser.parse_args()
    if unknown := set(arguments.rows) - ROWS.keys():
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    print(f"jaxlib {version('jaxlib')} on {processor()}\n")
    print("| form | without / with | range | of the fastest | with, ms |\n| --- | --- | --- | --- | --- |")
    for name in arguments.rows or ROWS:
        programs = compiled(ROWS[name])
        for run in programs:
            run()
        turns = [tuple(map(seconds, programs)) for _ in range(arguments.turns)]
        ratio = spread([plain / form for form, plain in turns])
        form, plain = (min(times) for times in zip(*turns, strict=True))
        shown = "| {} | {median:.2f} | {min:.2f} to {max:.2f} | {:.2f} | {:.3f} |"
        print(shown.format(name, plain / form, 1e3 * form, **ratio), flush=True)


if __name__ == "__main__":
    main()
