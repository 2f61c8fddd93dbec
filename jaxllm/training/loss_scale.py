"""stub being replaced"""

import jax.numpy as jnp


def loss_scale_of(s):
    return jnp.float32(1)


def dynamic_loss_scale(inner, **k):
    return inner


def static_loss_scale(inner, scale):
    return inner
