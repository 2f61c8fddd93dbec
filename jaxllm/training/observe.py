"""The largest magnitude of every intermediate of a function that has a given dtype, by module and by layer.

The function's jaxpr is evaluated as it stands with one reduction beside each operation: models and the train step
know nothing of it and stay as fast as they are, and no value escapes, named or not. A loop over layers gives one
reading per layer. This runs at log steps and after an overflow, never in the step itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.training.programs import INLINED, LOOP, inlined, is_backward, label


class Reading(NamedTuple):
    """One intermediate value.

    Attributes:
        block: module around it and its number in the stack, such as LlamaLayer[2]; empty outside all modules.
        name: block, inner module and operation, such as LlamaLayer[2]/down_proj: convert_element_type.
        backward: whether it belongs to the backward pass.
        largest: largest magnitude; inf or NaN when any element is.
        order: sorts readings by execution.
    """

    block: str
    name: str
    backward: bool
    largest: float
    order: tuple[int, ...]


class Observer:
    """Calls a function for the readings of its values of one dtype; compiled at the first call."""

    def __init__(self, function: Callable[..., Any], dtype: Any) -> None:
        self._function, self._dtype = function, jnp.dtype(dtype)
        self._sites: list[_Site] = []
        self._largest = jax.jit(self._trace)

    def __call__(self, *args: Any) -> list[Reading]:
        """Readings of function(*args), in the order of execution."""
        values = jax.device_get(self._largest(*args))
        readings = []
        for site, value in zip(self._sites, values, strict=True):
            readings.extend(site.reading(index, float(value[index])) for index in np.ndindex(value.shape))
        return sorted(readings, key=lambda reading: reading.order)

    def _trace(self, *args: Any) -> list[jax.Array]:
        closed = jax.make_jaxpr(self._function)(*args)
        scope = _Scope((), (), self._dtype)
        _, records = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args), scope)
        self._sites = [site for site, _ in records]
        return [value for _, value in records]


def first_nonfinite(readings: Sequence[Reading]) -> Reading | None:
    """The earliest reading that holds an infinity or NaN, None when all are finite."""
    return next((reading for reading in readings if not math.isfinite(reading.largest)), None)


def headroom(readings: Sequence[Reading], dtype: Any) -> dict[str, float]:
    """Per block, how often its largest value may still double in `dtype`: log2(largest number / largest value)."""
    top = math.log2(float(jnp.finfo(dtype).max))
    bits: dict[str, float] = {}
    for reading in readings:
        if not reading.block or reading.largest == 0:
            continue
        room = top - math.log2(reading.largest) if math.isfinite(reading.largest) else -math.inf
        bits[reading.block] = min(bits.get(reading.block, math.inf), room)
    return bits


class _Scope(NamedTuple):
    """Where in the program: positions and loops from the outside in, name stacks on the way; dtype looked for."""

    path: tuple[int | str, ...]
    stacks: tuple[str, ...]
    dtype: Any


class _Site(NamedTuple):
    scope: _Scope
    operation: str

    def reading(self, index: tuple[int, ...], largest: float) -> Reading:
        steps = iter(index)
        order = [_turn(part, next(steps)) if isinstance(part, str) else part for part in self.scope.path]
        block, name = label(self.scope.stacks, index)
        backward = is_backward(self.scope.stacks)
        return Reading(block, f"{name or 'loss'}: {self.operation}", backward, largest, tuple(order))


_FORWARD, _REVERSED = "loop", "reversed loop"
# What only moves numbers cannot be the first to spoil them.
_MOVES = {"reshape", "transpose", "broadcast_in_dim", "squeeze", "name", "split", "slice", "concatenate", "copy", "pad"}

_Records = list[tuple[_Site, jax.Array]]


def _evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], scope: _Scope) -> tuple[list[Any], _Records]:
    values: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    records: _Records = []
    for position, eqn in enumerate(jaxpr.eqns):
        inputs = [atom.val if hasattr(atom, "val") else values[atom] for atom in eqn.invars]
        stack = str(eqn.source_info.name_stack)
        here = scope._replace(path=(*scope.path, position), stacks=(*scope.stacks, stack))
        if eqn.primitive.name == "scan":
            outputs, inner = _evaluate_scan(eqn, inputs, here)
        elif eqn.primitive.name in INLINED:
            body, constants = inlined(eqn)
            outputs, inner = _evaluate(body, constants, inputs, here)
        else:
            result = eqn.primitive.bind(*inputs, **eqn.params)
            outputs = list(result) if eqn.primitive.multiple_results else [result]
            inner = [] if eqn.primitive.name in _MOVES else _measure(outputs, eqn.primitive.name, here)
        values.update(zip(eqn.outvars, outputs, strict=True))
        records.extend(inner)
    return [atom.val if hasattr(atom, "val") else values[atom] for atom in jaxpr.outvars], records


def _measure(outputs: Sequence[Any], operation: str, scope: _Scope) -> _Records:
    found = [x for x in outputs if x.dtype == scope.dtype and x.size]
    return [(_Site(scope, operation), _largest(x)) for x in found]


def _largest(x: jax.Array) -> jax.Array:
    # XLA:CPU's maximum of a large array leaves NaNs out.
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    return jnp.where(jnp.any(jnp.isnan(x)), jnp.nan, largest)


def _evaluate_scan(eqn: Any, inputs: list[Any], scope: _Scope) -> tuple[list[Any], _Records]:
    closed, backwards = eqn.params["jaxpr"], eqn.params["reverse"]
    # What a loop slices or stacks has one more axis outside it; the parameters that count it are gone in jax 0.12.
    carried = sum(not stacked for stacked in _stacked(eqn.outvars, closed.jaxpr.outvars))
    constants = len(inputs) - carried - sum(_stacked(eqn.invars, closed.jaxpr.invars))
    loop = _REVERSED if backwards else _FORWARD
    inner = scope._replace(path=(*scope.path, loop), stacks=(*scope.stacks, LOOP))
    consts, start, xs = inputs[:constants], inputs[constants : constants + carried], inputs[constants + carried :]
    sites: list[_Site] = []

    def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], tuple[list[Any], list[jax.Array]]]:
        outputs, records = _evaluate(closed.jaxpr, closed.consts, [*consts, *carry, *x], inner)
        sites[:] = [site for site, _ in records]
        return outputs[:carried], (outputs[carried:], [value for _, value in records])

    last, (ys, largest) = jax.lax.scan(body, start, xs, length=eqn.params["length"], reverse=backwards)
    return [*last, *ys], list(zip(sites, largest, strict=True))


def _stacked(outside: Sequence[Any], inside: Sequence[Any]) -> list[bool]:
    return [outer.aval.ndim > inner.aval.ndim for outer, inner in zip(outside, inside, strict=True)]


def _turn(loop: str, index: int) -> int:
    return -index if loop == _REVERSED else index
