"""A step that is compiled once, so that a recompilation cannot happen unseen.

jit would compile again for every new shape or dtype, for minutes and without a word. Here the first call compiles, and
an argument that differs later is refused by its name.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, ParamSpec, TypeVar

import jax

_log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


class RecompilationError(RuntimeError):
    """A step was given arguments of another shape, dtype or structure than it was compiled for."""


class DeviceError(RuntimeError):
    """The device, or its libraries, cannot run a step; the message says what to change."""


# What to do about it, by a word of XLA's message.
_ADVICE = {
    "cudnn": "set model.attention=chunked, which does without cuDNN, or update nvidia-cudnn",
    "resource_exhausted": "raise training.accumulation (fewer rows at once) or set model.remat to elementwise or full",
}


def refused_by_cudnn(error: BaseException) -> bool:
    """Whether cuDNN has no plan for an attention, by the compiler's message: memory and other XLA errors are not."""
    text = str(error).lower()
    if not isinstance(error, jax.errors.JaxRuntimeError) or any(sign in text for sign in _NOT_REFUSED):
        return False
    return any(sign in text for sign in _REFUSED)


# What cuDNN's frontend and XLA's callers of it write, and what such a text holds where cuDNN itself is not there.
_REFUSED = ("cudnn", "fmha", "no valid engine", "execution plan")
_NOT_REFUSED = ("resource_exhausted", "out of memory", "alloc_failed", "not_initialized", "initialization failed")


@contextlib.contextmanager
def explained(name: str) -> Iterator[None]:
    """Adds what to do about it to what a device cannot do; `name` says what it was asked for."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        for sign, advice in _ADVICE.items():
            if sign in message.lower():
                raise DeviceError(f"the {name} cannot run here: {message.splitlines()[0]}; {advice}") from error
        raise


class CompiledOnce(Generic[P, R]):
    """A pure function behind one executable, compiled for the arguments of its first call."""

    def __init__(
        self, function: Callable[P, R], *, name: str, check: Callable[[int], None] | None = None, **options: Any
    ) -> None:
        """Compiles nothing yet.

        Args:
            function: pure.
            name: for messages.
            check: told how many bytes of each device it needs, arguments included, before it runs for the first time.
            options: of `jax.jit`, such as donate_argnums.
        """
        self._jitted = jax.jit(function, **options)
        self._name, self._check = name, check
        self._executable: jax.stages.Compiled | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs the executable.

        Raises:
            RecompilationError: naming the argument that changed.
            DeviceError: when cuDNN has no kernel for it, or memory ends.
        """
        if self._executable is None:
            self._executable = self._compile(*args, **kwargs)
        try:
            with explained(self._name):
                return self._executable(*args, **kwargs)
        except TypeError as error:
            raise RecompilationError(
                f"the {self._name} was compiled for other arguments; batches must keep their shapes and dtypes. {error}"
            ) from error

    def _compile(self, *args: Any, **kwargs: Any) -> jax.stages.Compiled:
        start = time.perf_counter()
        with explained(self._name):
            executable = self._jitted.lower(*args, **kwargs).compile()
        seconds = time.perf_counter() - start
        memory = executable.memory_analysis()
        needed = 0 if memory is None else memory.argument_size_in_bytes + memory.temp_size_in_bytes
        _log.info("%s compiled in %.1f s, %.2f GB with its arguments", self._name, seconds, needed / 1e9)
        if self._check is not None:
            self._check(needed)
        return executable
