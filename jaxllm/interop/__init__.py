"""Weights of other libraries: Hugging Face directories to ours, and back."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


class InteropError(ValueError):
    """A checkpoint of another library that cannot be read or written; the message names what is wrong in it."""


# transformers' name of an activation: ours.
ACTIVATIONS: dict[str, Any] = {
    **{"silu": "silu", "swish": "silu", "relu": "relu"},
    **{"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"},
}


def weight_dtype(dtype: Any) -> Any:
    """The NumPy dtype of weights; InteropError unless it is a float: integers would destroy them silently."""
    known = ("float32", "bfloat16", "float16", *(["float64"] if jax.config.read("jax_enable_x64") else []))
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in known:
        raise InteropError(f"weights cannot be {dtype}; use one of {', '.join(known)}")
    return found


def check_readable(path: Path) -> None:
    """Raises InteropError with the system's reason where a file cannot be opened; libraries call it damaged."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise InteropError(f"{path} cannot be read: {error.strerror}; check its permissions and its disk") from None
