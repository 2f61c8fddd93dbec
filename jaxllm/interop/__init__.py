"""Weights of other libraries: Hugging Face directories and Meta's checkpoints to ours, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


class InteropError(ValueError):
    """A checkpoint of another library that cannot be read or written; the message names what is wrong in it."""


def weight_dtype(dtype: Any) -> Any:
    """The NumPy dtype that a user asked for weights to have.

    Raises:
        InteropError: when it is none that weights can have: casting them to integers would destroy them silently.
    """
    known = ("float32", "bfloat16", "float16", *(["float64"] if jax.config.read("jax_enable_x64") else []))
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in known:
        raise InteropError(f"weights cannot be {dtype}; use one of {', '.join(known)}")
    return found


def check_readable(path: Path) -> None:
    """Opens a file, since libraries call one that the system refuses missing or damaged.

    Raises:
        InteropError: with the system's reason.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        raise InteropError(f"{path} cannot be read: {error.strerror}; check its permissions and its disk") from None
