"""The largest magnitude of every intermediate of a function that has a given dtype, by module and by layer.

The function's jaxpr is evaluated as it stands with one reduction next to each operation: models and the train step
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

from jaxllm.jaxprs.interpret import REVERSED, Place, Record, Visitor, bind, run
from jaxllm.jaxprs.programs import is_backward, label


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
        _, records = run(self._function, args, {}, Visitor(lambda _: True, self._measure))
        self._sites = [site for site, _ in records]
        return [value for _, value in records]

    def _measure(self, eqn: Any, inputs: list[Any], place: Place) -> tuple[list[Any], list[Record]]:
        outputs, operation = bind(eqn, inputs), eqn.primitive.name
        found = [x for x in outputs if x.dtype == self._dtype and x.size and operation not in _MOVES]
        return outputs, [(_Site(place.path, place.stacks, operation), _largest(x)) for x in found]


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


class _Site(NamedTuple):
    path: tuple[int | str, ...]
    stacks: tuple[str, ...]
    operation: str

    def reading(self, index: tuple[int, ...], largest: float) -> Reading:
        steps = iter(index)
        order = [_turn(part, next(steps)) if isinstance(part, str) else part for part in self.path]
        block, name = label(self.stacks, index)
        backward = is_backward(self.stacks)
        return Reading(block, f"{name or 'loss'}: {self.operation}", backward, largest, tuple(order))


def _turn(loop: str, index: int) -> int:
    return -index if loop == REVERSED else index


# What only moves numbers cannot be the first to spoil them.
_MOVES = {"reshape", "transpose", "broadcast_in_dim", "squeeze", "name", "split", "slice", "concatenate", "copy", "pad"}


def _largest(x: jax.Array) -> jax.Array:
    # XLA:CPU's maximum of a large array leaves NaNs out.
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    return jnp.where(jnp.any(jnp.isnan(x)), jnp.nan, largest)
