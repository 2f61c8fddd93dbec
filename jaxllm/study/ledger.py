"""The precision ledger: every operation of a run's train step whose dtypes matter, read from its jaxpr.

It lists matmuls, reductions, exponentials, norms and casts by the dtypes that they read, accumulate in and return. A
sum accumulated below float32, or an island's function computed below it, is an error unless the config moves that
island (`allowed`). Nothing is compiled and no array is made. Out of scope: the inside of a kernel (`kernel` rows).

>>> from jaxllm.config import LlamaConfig
>>> model = LlamaConfig(vocab_size=64, d_model=16, d_ff=32, num_layers=1, num_heads=2)
>>> config = RunConfig(model=model, precision=PrecisionConfig(compute="bfloat16"))
>>> entries = train_step_ledger(config)
>>> sorted({entry.accumulation for entry in entries if entry.kind == "matmul"}), violations(entries)
(['float32'], [])
"""

import functools
import math
import operator
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.config import PrecisionConfig, RunConfig
from jaxllm.jaxprs.interpret import LOOP, is_backward, label, programs
from jaxllm.training.program import program_of
from jaxllm.training.sharding import AnyMesh


class Entry(NamedTuple):
    """One kind of operation in one module and pass."""

    kind: str  # matmul, reduction, exp, norm, cast or kernel
    operation: str  # JAX's name of it
    where: str  # modules around it, and the pass
    inputs: str  # dtypes read
    accumulation: str  # dtype of the running sum; for casts and pointwise functions that of the output
    output: str  # dtype returned

    @property
    def low(self) -> bool:
        """Whether it sums below float32, or computes an island's function below it."""
        guarded = self.kind in ("matmul", "reduction") or self.operation in _ISLAND_FUNCTIONS
        return guarded and self.accumulation in ("bfloat16", "float16")


_BACKWARD = " (backward)"
_ISLAND_FUNCTIONS = ("exp", "exp2", "log", "log1p", "rsqrt", "sqrt", "sin", "cos")
# Operations that an island may run below float32: its function, and sums of its gradient. A `jax.named_scope` marks the
# island; those of logits and the residual stream compute nothing below float32.
_MOVED = {
    "norms": ("rsqrt", "reduce_sum"),
    "softmax": ("exp", "reduce_sum"),
    "relative_bias": ("reduce_sum",),
}


def allowed(config: PrecisionConfig) -> set[tuple[str, str]]:
    """(island, operation) pairs that may be below float32 because the config moves the island."""
    low = [island for island, dtype in config.islands.items() if dtype != "float32"]
    return {(island, operation) for island in low for operation in _MOVED.get(island, ())}


_KINDS = {
    **dict.fromkeys(("dot_general", "ragged_dot_general", "conv_general_dilated"), "matmul"),
    **dict.fromkeys(("reduce_sum", "reduce_prod", "cumsum", "cumprod", "cumlogsumexp"), "reduction"),
    **dict.fromkeys(
        ("scatter-add", "scatter_add", "reduce_window_sum", "psum", "add_reduce", "reduce_scatter"), "reduction"
    ),
    **dict.fromkeys(("exp", "exp2", "expm1", "log", "log1p", "tanh", "logistic", "erf", "sin", "cos", "pow"), "exp"),
    **dict.fromkeys(("rsqrt", "sqrt"), "norm"),
    "convert_element_type": "cast",
}


def train_step_ledger(config: RunConfig, mesh: AnyMesh | None = None) -> Counter[Entry]:
    """How often each entry runs in one train step of `config`, over layers, chunks and microbatches, on each device."""
    program = program_of(config, mesh)
    step = jax.make_jaxpr(program.train_step)(program.abstract_state(), program.abstract_batch())
    return ledger(step.jaxpr)


def ledger(jaxpr: Any) -> Counter[Entry]:
    """Entries of a program and how often each runs: the larger branch of a condition, a while once."""
    return _walk(jaxpr, (), 1)


def violations(entries: Counter[Entry], excused: Collection[tuple[str, str]] = ()) -> list[Entry]:
    """Entries below float32 that no (island, operation) pair of `excused` covers, see `allowed`."""

    def ok(entry: Entry) -> bool:
        scopes = entry.where.removesuffix(_BACKWARD).split("/")
        return any(operation == entry.operation and island in scopes for island, operation in excused)

    return [entry for entry in entries if entry.low and not ok(entry)]


def _walk(jaxpr: Any, stacks: tuple[str, ...], times: int) -> Counter[Entry]:
    total: Counter[Entry] = Counter()
    for eqn in jaxpr.eqns:
        here = (*stacks, str(eqn.source_info.name_stack))
        entry = _entry(eqn, here)
        if entry is not None:
            total[entry] += times
        if _is_kernel(eqn):
            continue
        inside, repeats = here, times
        if eqn.primitive.name in ("scan", "while"):
            inside, repeats = (*here, LOOP), times * eqn.params.get("length", 1)
        bodies = [_walk(body, inside, repeats) for body in programs(eqn)]
        together = operator.or_ if eqn.primitive.name == "cond" else operator.add  # the larger count, or the sum
        total += functools.reduce(together, bodies, Counter())
    return total


def _entry(eqn: Any, stacks: Sequence[str]) -> Entry | None:
    name = eqn.primitive.name
    kind = "kernel" if _is_kernel(eqn) else _KINDS.get(name)
    inputs = [str(atom.aval.dtype) for atom in eqn.invars if _floating(atom)]
    outputs = [str(atom.aval.dtype) for atom in eqn.outvars if _floating(atom)]
    if kind is None or not inputs or not outputs or (kind == "cast" and inputs[0] == outputs[0]):
        return None
    large = max((math.prod(atom.aval.shape) for atom in (*eqn.invars, *eqn.outvars)), default=0)
    if large <= 1 and kind != "kernel":
        return None  # single numbers, such as the learning rate's schedule
    module = label(stacks)[1] or "step"
    where = f"{module}{_BACKWARD}" if is_backward(stacks) else module
    accumulation = eqn.params.get("preferred_element_type") or outputs[0]
    return Entry(kind, name, where, " ".join(dict.fromkeys(inputs)), str(jnp.dtype(accumulation)), outputs[0])


def _is_kernel(eqn: Any) -> bool:
    return "pallas" in eqn.primitive.name or "dot_product_attention" in eqn.primitive.name


def _floating(atom: Any) -> bool:
    dtype = getattr(atom.aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)
