"""Functions with a rule of their own for the backward pass, and an error that names the way to go forward."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

_FIX = "Use jaxllm.study.forward_mode(f) in place of the function f that is differentiated"


class custom_vjp:
    """As `jax.custom_vjp`; the error of `jax.jvp`, `jacfwd`, `linearize` and `hessian` has the fix."""

    def __init__(self, function: Callable[..., Any], nondiff_argnums: Sequence[int] = ()) -> None:
        functools.update_wrapper(self, function)
        self._call: Any = jax.custom_vjp(function, nondiff_argnums=nondiff_argnums)
        self.defvjp = self._call.defvjp

    def __call__(self, *args: Any) -> Any:
        """The function's value; where jit has compiled it, jax's error comes later and shows the line of the call."""
        try:
            return self._call(*args)  # for jvp, jacfwd, linearize, hessian: jaxllm.study.forward_mode(f) in place of f
        except TypeError as error:
            if "forward-mode" in str(error) and _FIX not in str(error):
                error.args = (f"{error} {_FIX}.",)
            raise
