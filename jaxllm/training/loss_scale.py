"""Being replaced: the loss scale of `precision`."""

import jax.numpy as jnp


def loss_scale_of(s):
    """1."""
    return jnp.float32(1)


def dynamic_loss_scale(inner, **k):
    """Inner."""
    return inner


def static_loss_scale(inner, scale):
    """Inner."""
    return inner
