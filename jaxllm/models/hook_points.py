"""Hook points: the values that layers name, for `jaxllm.study` to find and for `remat: elementwise` to keep."""

from collections.abc import Callable

from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

Drop = Callable[[Array, str], Array]  # a value, and the name of its place, whose key it uses

# Each name, and whether `remat: elementwise` keeps the value: no matmul then runs twice, cheap operations do.
# `jaxllm.ops.attention` names one more, `attention_weights`, on the path that builds them.
HOOK_POINTS = {
    "input": False,
    "query": True,
    "key": True,
    "value": True,
    "heads": True,
    "attention_output": False,
    "after_attention": True,
    "cross_attention_output": False,
    "after_cross_attention": True,
    "gate": True,
    "up": True,
    "neurons": False,
    "mlp_output": False,
    "after_mlp": False,
}
KEPT = tuple(name for name, kept in HOOK_POINTS.items() if kept)


def mark(x: Array, name: str) -> Array:
    """The value itself, under a name of `HOOK_POINTS`; adds no operation to the program."""
    if name not in HOOK_POINTS:
        raise ValueError(f"{name!r} is not a hook point; known: {', '.join(HOOK_POINTS)}")
    return checkpoint_name(x, name)


def add(x: Float[Array, "B T D"], update: Float[Array, "B T D"], sublayer: str, drop: Drop | None = None) -> Array:
    """The residual stream after a sublayer, in its own dtype."""
    update = mark(update, f"{sublayer}_output")
    if drop is not None:
        update = drop(update, sublayer)
    return mark(x + update.astype(x.dtype), f"after_{sublayer}")
