"""A step that is compiled once: its first call compiles, and a later argument of another kind is refused by its name.

jit would silently compile again for every new shape or dtype, for minutes.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

import jax

from jaxllm.host import processes
from jaxllm.ops.cudnn import calls_in, refused

_log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


class RecompilationError(RuntimeError):
    """A step was given arguments of another shape, dtype or structure than it was compiled for."""


class DeviceError(RuntimeError):
    """The device, or its libraries, cannot run a step; the message has what to change."""


# By a word of XLA's message.
_ADVICE = {
    "resource_exhausted": "raise training.accumulation (fewer rows at once) or set model.remat to elementwise or full",
    "cudnn": "set model.attention=chunked, which does without cuDNN, or update nvidia-cudnn",
}


@contextlib.contextmanager
def explained(name: str) -> Iterator[None]:
    """Adds advice to an error of the device or its compiler; `name` is what could not run."""
    try:
        yield
    except MemoryError as error:
        raise DeviceError(
            f"the {name} needs more memory than this machine has; {_ADVICE['resource_exhausted']}"
        ) from error
    except Exception as error:
        if not refused(error) and not isinstance(error, jax.errors.JaxRuntimeError):
            raise
        cause = f"the {name} cannot run here: {str(error).splitlines()[0]}"
        if refused(error):
            raise DeviceError(f"{cause}; {_ADVICE['cudnn']}") from error
        for sign, advice in _ADVICE.items():
            if sign in str(error).lower():
                raise DeviceError(f"{cause}; {advice}") from error
        raise


def shared_cache(path: str | None) -> str | None:
    """The folder of compiled programs; None where it is not the same for all processes, which compile together."""
    if path is None or processes.shares(Path(path).expanduser()):
        return path
    _log.warning("training.compilation_cache %s is not used, because the processes do not share that folder", path)
    return None


class CompiledOnce(Generic[P, R]):
    """A pure function behind one executable, compiled for the arguments of its first call.

    Attributes:
        needed: bytes of each device, arguments included; 0 before it is compiled or where the compiler gives none.
    """

    def __init__(self, function: Callable[P, R], *, name: str, **options: Any) -> None:
        """Compiles nothing yet; `name` is for messages, `options` are those of `jax.jit`."""
        self._jitted = jax.jit(function, **options)
        self._name = name
        self._executable: jax.stages.Compiled | None = None
        self.needed = 0

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs the executable.

        Raises:
            RecompilationError: naming the argument that changed.
            DeviceError: as `prepare`, or when memory ends.
        """
        executable = self.prepare(*args, **kwargs)
        try:
            with explained(self._name):
                return executable(*args, **kwargs)
        except TypeError as error:
            raise RecompilationError(
                f"the {self._name} was compiled for other arguments; batches must keep their shapes and dtypes. {error}"
            ) from error

    def text(self) -> str:
        """The compiled program; empty before it is compiled."""
        return "" if self._executable is None else self._executable.as_text() or ""

    def prepare(self, *args: Any, **kwargs: Any) -> Callable[..., R]:
        """The executable, compiled for these arguments (or arguments like them) at first; errors are `explained`."""
        if self._executable is not None:
            return self._executable
        start = time.perf_counter()
        _log.info("compiling the %s", self._name)
        with explained(self._name):
            lowered = self._jitted.lower(*args, **kwargs)
            try:
                self._executable = lowered.compile()
            except jax.errors.JaxRuntimeError as error:
                if refused(error):
                    _log.warning("the %s needs cuDNN plans for %s", self._name, ", ".join(calls_in(lowered.as_text())))
                raise
        seconds = time.perf_counter() - start
        memory = self._executable.memory_analysis()
        self.needed = 0 if memory is None else memory.argument_size_in_bytes + memory.temp_size_in_bytes
        _log.info("%s compiled in %.1f s, %.2f GB with its arguments", self._name, seconds, self.needed / 1e9)
        return self._executable
