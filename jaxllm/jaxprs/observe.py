"""The largest magnitude of every intermediate of a function that has a given dtype, by module and by layer.

The function's jaxpr is evaluated with one reduction after each operation. Models and the train step need no hooks and
stay as fast as they are. A loop over layers gives one reading per layer. This runs at log steps and after an overflow,
never in the step itself.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.jaxprs.interpret import FORWARD, REVERSED, Place, Record, Visitor, bind, is_backward, label, run
from jaxllm.ops.backend import largest_magnitude


class Reading(NamedTuple):
    """One intermediate value."""

    block: str  # module around it and its number, such as LlamaLayer[2]; empty outside all modules
    name: str  # block, inner module and operation, such as LlamaLayer[2]/down_proj: convert_element_type
    backward: bool  # whether it belongs to the backward pass
    largest: float  # largest magnitude; inf or NaN when any element is
    order: tuple[int, ...]  # sorts readings by execution


class Observer:
    """Calls a function for the readings of its values of one dtype; compiled at the first call.

    `spread` maps the function that computes them to one of the same arguments on several devices.
    """

    def __init__(
        self, function: Callable[..., Any], dtype: Any, spread: Callable[..., Any] = lambda function: function
    ) -> None:
        self._function, self._dtype = function, jnp.dtype(dtype)
        self._values: list[_Value] = []
        self._largest = jax.jit(spread(self._trace))

    def __call__(self, *args: Any) -> list[Reading]:
        """Readings of function(*args), in the order of execution."""
        largest = jax.device_get(self._largest(*args))
        readings = []
        for value, found in zip(self._values, largest, strict=True):
            readings.extend(value.reading(index, float(found[index])) for index in np.ndindex(found.shape))
        return sorted(readings, key=lambda reading: reading.order)

    def _trace(self, *args: Any) -> list[jax.Array]:
        _, records = run(self._function, args, {}, Visitor(lambda _: True, self._measure))
        self._values = [value for value, _ in records]
        return [largest for _, largest in records]

    def _measure(self, eqn: Any, inputs: list[Any], place: Place) -> tuple[list[Any], list[Record]]:
        outputs, operation = bind(eqn, inputs), eqn.primitive.name
        found = [x for x in outputs if x.dtype == self._dtype and x.size and operation not in _MOVES]
        largest = (largest_magnitude(x, axis=None).astype(jnp.float32) for x in found)
        return outputs, [(_Value(place.path, place.stacks, operation), x) for x in largest]


def first_nonfinite(readings: Sequence[Reading]) -> Reading | None:
    """The earliest reading with an infinity or NaN; None when all are finite."""
    return next((reading for reading in readings if not math.isfinite(reading.largest)), None)


def headroom(readings: Sequence[Reading], dtype: Any) -> dict[str, float]:
    """For each block, how often its largest value may double: log2(largest number of `dtype` / value)."""
    top = math.log2(float(jnp.finfo(dtype).max))
    bits: dict[str, float] = {}
    for reading in readings:
        if not reading.block or reading.largest == 0:
            continue
        room = top - math.log2(reading.largest) if math.isfinite(reading.largest) else -math.inf
        bits[reading.block] = min(bits.get(reading.block, math.inf), room)
    return bits


class _Value(NamedTuple):
    path: tuple[int | str, ...]
    stacks: tuple[str, ...]
    operation: str

    def reading(self, index: tuple[int, ...], largest: float) -> Reading:
        steps = iter(index)
        order = [part if isinstance(part, int) else next(steps) * _DIRECTION[part] for part in self.path]
        block, name = label(self.stacks, index)
        backward = is_backward(self.stacks)
        return Reading(block, f"{name or 'loss'}: {self.operation}", backward, largest, tuple(order))


_DIRECTION = {FORWARD: 1, REVERSED: -1}
# Operations that only move numbers cannot be the first to make them non-finite.
_MOVES = {"reshape", "transpose", "broadcast_in_dim", "squeeze", "name", "split", "slice", "concatenate", "copy", "pad"}
