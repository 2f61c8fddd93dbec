"""Mixed precision: float32 master weights, one compute dtype, float32 islands, and a dynamic loss scale.

`precision.compute` sets the compute dtype, and `precision.islands` moves single islands: docs/mixed_precision.md has a
table of them, and shows why float16 needs a loss scale (arXiv 1710.03740). RoPE's angles, all sums, moments and updates
are always float32. `scripts/precision_ledger.py` lists the dtypes of a compiled train step.

The loss scale moves exactly as that of torch.amp.GradScaler, and also has a floor, a ceiling and hysteresis. It
unscales gradients before `inner`, and skips the update when any is non-finite: a select that XLA fuses into the update,
so the host does not wait. Out of scope: multiplying the loss (`train_step`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxllm.config import RunConfig
from jaxllm.models import Model, build
from jaxllm.models.layers import Islands
from jaxllm.training.attribution import all_finite


def build_model(config: RunConfig) -> Model:
    """The model of a run, in the compute dtype and with the islands that `precision.islands` moves.

    >>> from jaxllm.config import LlamaConfig, PrecisionConfig
    >>> model = LlamaConfig(vocab_size=64, d_model=16, d_ff=32, num_layers=1, num_heads=2)
    >>> moved = PrecisionConfig(compute="bfloat16", islands={"softmax": "bfloat16"})
    >>> build_model(RunConfig(model=model, precision=moved)).islands.softmax
    dtype(bfloat16)
    """
    precision = config.precision
    islands = {name: jnp.dtype(dtype) for name, dtype in precision.islands.items() if name != "rope"}
    return build(config.model, dtype=jnp.dtype(precision.compute), islands=Islands(**islands))


def cast_floating(tree: Any, dtype: Any) -> Any:
    """Casts floating leaves to dtype and leaves integers and keys alone."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


class LossScaleState(NamedTuple):
    """Scalars around the state of the wrapped rule."""

    scale: Float[Array, ""]  # factor of the next step's loss
    tracker: Int[Array, ""]  # finite steps in a row since the scale last changed
    overflows: Int[Array, ""]  # overflows in a row
    at_floor: Int[Array, ""]  # overflows in a row while the scale was at its floor
    skipped: Int[Array, ""]  # steps skipped since the start
    inner: Any  # state of the wrapped rule


def dynamic_loss_scale(
    inner: optax.GradientTransformation,
    *,
    initial_scale: float = 2.0**16,
    growth_interval: int = 2000,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    min_scale: float = 1.0,
    max_scale: float = 2.0**24,
    hysteresis: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Wraps any rule so that it takes gradients of scale * loss; put clipping inside, where gradients are unscaled.

    A caller that has already checked the unscaled gradients passes `finite` to `update`. On overflow the updates are
    -0.0, which changes no number, not even -0.0. The whole inner state stays: moments, averages and the schedule's
    count. A rule that is chained outside would still count the skipped step.

    >>> rule = dynamic_loss_scale(optax.adam(0.1))
    >>> params = {"w": jnp.float32(2.0)}
    >>> state = rule.init(params)
    >>> grads = jax.grad(lambda params: loss_scale_of(state) * params["w"] ** 2)(params)
    >>> updates, state = rule.update(grads, state, params)
    >>> print(f"{grads['w']:.0f} {updates['w']:.3f}")
    262144 -0.100
    >>> updates, state = rule.update({"w": jnp.float32(jnp.inf)}, state, params)
    >>> print(updates["w"], state.scale, state.skipped)
    -0.0 32768.0 1

    Args:
        inner: clipping, moments, weight decay, learning rate.
        initial_scale: first scale.
        growth_interval: finite steps in a row after which the scale grows.
        growth_factor: growth of the scale, left out where it would pass `max_scale`.
        backoff_factor: shrinkage on overflow, down to `min_scale`.
        min_scale: floor; without one, overflows drive the scale to 0, and 0/0 puts NaN into the parameters.
        max_scale: ceiling; float32's largest number gives torch's behaviour.
        hysteresis: the scale shrinks from this overflow in a row on; torch has 1.

    Raises:
        ValueError: for constants with which the scale could not move as described.
    """
    if not 0 < min_scale <= initial_scale <= max_scale:
        found = f"{min_scale}, {initial_scale} and {max_scale}"
        raise ValueError(f"need 0 < min_scale <= initial_scale <= max_scale, got {found}")
    if not (growth_factor > 1 > backoff_factor > 0 and growth_interval >= 1 and hysteresis >= 1):
        need = "growth_factor > 1 > backoff_factor > 0, growth_interval and hysteresis of at least 1"
        raise ValueError(f"need {need}, got {growth_factor}, {backoff_factor}, {growth_interval} and {hysteresis}")
    rule = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> LossScaleState:
        scale = jnp.asarray(initial_scale, jnp.float32)
        # A buffer for each: donation refuses one given twice.
        tracker, overflows, at_floor, skipped = (jnp.zeros((), jnp.int32) for _ in range(4))
        return LossScaleState(scale, tracker, overflows, at_floor, skipped, rule.init(params))

    def moved(state: LossScaleState, finite: Bool[Array, ""]) -> LossScaleState:
        """The scale and its counts after a step."""
        tracker = jnp.where(finite, state.tracker + 1, 0)
        overflows = jnp.where(finite, 0, state.overflows + 1)
        grown = state.scale * growth_factor
        up = jnp.where((tracker >= growth_interval) & (grown <= max_scale), grown, state.scale)
        shrunk = jnp.maximum(state.scale * backoff_factor, min_scale)
        down = jnp.where(overflows >= hysteresis, shrunk, state.scale)
        return state._replace(
            scale=jnp.where(finite, up, down),
            tracker=jnp.where(tracker >= growth_interval, 0, tracker),
            overflows=overflows,
            at_floor=jnp.where(finite | (state.scale > min_scale), 0, state.at_floor + 1),
            skipped=state.skipped + ~finite,
        )

    def update(
        updates: Any, state: Any, params: Any = None, *, finite: Bool[Array, ""] | None = None, **extra: Any
    ) -> tuple[Any, LossScaleState]:
        grads = unscale(updates, state.scale)
        finite = all_finite(grads) if finite is None else finite
        proposed, inner = rule.update(grads, state.inner, params, **extra)
        proposed = jax.tree.map(lambda x: jnp.where(finite, x, jnp.asarray(-0.0, x.dtype)), proposed)
        after = moved(state, finite)
        inner = jax.tree.map(lambda new, old: jnp.where(finite, new, old), inner, state.inner)
        return proposed, after._replace(inner=inner)

    return optax.GradientTransformationExtraArgs(init, update)


def static_loss_scale(inner: optax.GradientTransformation, scale: float) -> optax.GradientTransformationExtraArgs:
    """A scale that never moves; overflowing steps are still skipped, and counted as overflows at the floor."""
    return dynamic_loss_scale(inner, initial_scale=scale, min_scale=scale, max_scale=scale)


def unscale(grads: Any, scale: Float[Array, ""] | float) -> Any:
    """`grads` / `scale` in float32 or wider, which keeps the small gradients of float16."""
    inverse = 1 / jnp.asarray(scale, jnp.float32)
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)) * inverse, grads)


def loss_scale_state(opt_state: Any) -> LossScaleState | None:
    """The `LossScaleState` in an optimizer state, at any depth of a chain; None when there is none."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, LossScaleState))
    return next((node for node in nodes if isinstance(node, LossScaleState)), None)


def loss_scale_of(opt_state: Any) -> Float[Array, ""]:
    """The factor of the next loss; 1 without a loss scale."""
    state = loss_scale_state(opt_state)
    return jnp.ones((), jnp.float32) if state is None else state.scale
