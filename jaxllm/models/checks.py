"""Misuse that would silently compute something else: each is an error with its fix."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp


def refuse(module: nn.Module, *names: str) -> None:
    """Raises ValueError for parameters that the module would leave unread: they are another model's."""
    found = [name for name in names if module.has_variable("params", name)]
    if found:
        raise ValueError(
            f"the parameters hold {', '.join(found)} in {type(module).__name__}, but the model's config does not have "
            "it: use the parameters of the same model"
        )


def check_tokens(tokens: Any, name: str) -> None:
    """Raises ValueError unless tokens are an integer array [B, T], not empty."""
    shape, dtype = getattr(tokens, "shape", None), getattr(tokens, "dtype", None)
    if shape is None or dtype is None:
        raise ValueError(f"{name} must be an integer array [B, T], got {type(tokens).__name__}; use jnp.asarray")
    if len(shape) != 2 or 0 in shape or not jnp.issubdtype(dtype, jnp.integer):
        fix = f"; a single row is {name}[None]" if len(shape) == 1 else ""
        raise ValueError(f"{name} must be an integer array [B, T], got {dtype}{list(shape)}{fix}")


def listed(names: Sequence[str], most: int = 8) -> str:
    """The first names and how many more there are, for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def check_shape(value: Any, name: str, *shapes: tuple[int, ...]) -> None:
    """Raises ValueError unless the value is None or has one of the shapes."""
    if value is not None and value.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise ValueError(f"{name} must be of shape {wanted}, got {list(value.shape)}")
