"""Loss scaling as an optax transformation: gradients come in scaled, the wrapped rule sees them unscaled or not at all.

float16 loses digits below 2^-14 and has no numbers below 2^-24. Without a scale, 0.15% to 0.84% of the non-zero
gradients of two small models became 0 (docs/mixed_precision.md). So the loss is multiplied by a scale, gradients are
divided by it in float32, and a step whose gradients overflow is skipped with a smaller scale for the next one
(arXiv 1710.03740). The scale moves exactly as torch.amp.GradScaler moves it, and besides has a floor, a ceiling and
hysteresis. Skipping is a select, not a branch: XLA fuses it into the update, no host waits for the answer, and one
decision holds for all devices. Out of scope: multiplying the loss, which is the train step's work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

Value = TypeVar("Value")


class LossScaleState(NamedTuple):
    """Scalars around the state of the wrapped rule.

    Attributes:
        scale: what the loss of the next step is multiplied by.
        tracker: finite steps in a row since the scale last changed.
        overflows: overflows in a row.
        at_floor: overflows in a row while the scale was at its floor.
        skipped: steps skipped since the start.
        retried: recomputations since the start, see `retry`.
        inner: state of the wrapped rule.
    """

    scale: Float[Array, ""]
    tracker: Int[Array, ""]
    overflows: Int[Array, ""]
    at_floor: Int[Array, ""]
    skipped: Int[Array, ""]
    retried: Int[Array, ""]
    inner: Any


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

    `update` takes `finite` from a caller who already knows whether the unscaled gradients are, and else looks itself.
    On overflow the updates are -0.0 (which adds nothing to any number, not even to -0.0) and the whole inner state
    stays as it is: moments, averages and the schedule's count. What is chained outside would not know of the skip.

    Args:
        inner: clipping, moments, weight decay, learning rate.
        initial_scale: first scale.
        growth_interval: finite steps in a row after which the scale grows.
        growth_factor: growth of the scale; a growth past `max_scale` is not done.
        backoff_factor: shrinkage on overflow, down to `min_scale`.
        min_scale: floor; without one, overflows drive the scale to 0 and 0/0 into the parameters.
        max_scale: ceiling; float32's largest number gives torch's behaviour.
        hysteresis: number of the overflow in a row from which on the scale shrinks; torch has 1.

    Raises:
        ValueError: for constants with which the scale could not move as described.
    """
    movement = _Movement(growth_interval, growth_factor, backoff_factor, min_scale, max_scale, hysteresis)
    _check(movement, initial_scale)
    rule = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> LossScaleState:
        def zero() -> Array:  # a buffer for each: donation refuses one given twice
            return jnp.zeros((), jnp.int32)

        scale = jnp.asarray(initial_scale, jnp.float32)
        return LossScaleState(scale, zero(), zero(), zero(), zero(), zero(), rule.init(params))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        finite: Bool[Array, ""] | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, LossScaleState]:
        grads = unscale(updates, state.scale)
        finite = all_finite(grads) if finite is None else finite
        proposed, inner_state = rule.update(grads, state.inner, params, **extra)
        return (
            jax.tree.map(lambda x: jnp.where(finite, x, jnp.asarray(-0.0, x.dtype)), proposed),
            _moved(state, finite, movement)._replace(
                inner=jax.tree.map(lambda new, old: jnp.where(finite, new, old), inner_state, state.inner)
            ),
        )

    return optax.GradientTransformationExtraArgs(init, update)


class _Movement(NamedTuple):
    growth_interval: int
    growth_factor: float
    backoff_factor: float
    min_scale: float
    max_scale: float
    hysteresis: int


def _check(by: _Movement, initial_scale: float) -> None:
    if not 0 < by.min_scale <= initial_scale <= by.max_scale:
        raise ValueError(
            f"need 0 < min_scale <= initial_scale <= max_scale, got initial_scale {initial_scale} and {by}"
        )
    if not (by.growth_factor > 1 > by.backoff_factor > 0 and by.growth_interval >= 1 and by.hysteresis >= 1):
        raise ValueError(f"need growth_factor > 1 > backoff_factor > 0 and counts of at least 1, got {by}")


def _moved(state: LossScaleState, finite: Bool[Array, ""], by: _Movement) -> LossScaleState:
    tracker = jnp.where(finite, state.tracker + 1, 0)
    overflows = jnp.where(finite, 0, state.overflows + 1)
    grown = state.scale * by.growth_factor
    up = jnp.where((tracker >= by.growth_interval) & (grown <= by.max_scale), grown, state.scale)
    shrunk = jnp.maximum(state.scale * by.backoff_factor, by.min_scale)
    down = jnp.where(overflows >= by.hysteresis, shrunk, state.scale)
    return state._replace(
        scale=jnp.where(finite, up, down),
        tracker=jnp.where(tracker >= by.growth_interval, 0, tracker),
        overflows=overflows,
        at_floor=jnp.where(finite | (state.scale > by.min_scale), 0, state.at_floor + 1),
        skipped=state.skipped + ~finite,
    )


def static_loss_scale(inner: optax.GradientTransformation, scale: float) -> optax.GradientTransformationExtraArgs:
    """A scale that never moves; overflowing steps are still skipped, and counted as overflows at the floor."""
    return dynamic_loss_scale(inner, initial_scale=scale, min_scale=scale, max_scale=scale)


def unscale(grads: Any, scale: Float[Array, ""] | float) -> Any:
    """Grads / scale, at least in float32, where the small ones of float16 survive."""
    inverse = 1 / jnp.asarray(scale, jnp.float32)
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)) * inverse, grads)


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether no element of any leaf is an infinity or NaN.

    Of unscaled gradients one look is enough: what was infinite or NaN before the division by a scale is so after it,
    and a scale of 0, or one below 1, may add to that.
    """
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def finite_rows(stack: Float[Array, "L ..."]) -> Bool[Array, " L"]:
    """Whether each row of the first axis, a layer of a stack, is finite."""
    return jnp.all(jnp.isfinite(stack), axis=tuple(range(1, stack.ndim)))


def loss_scale_state(opt_state: Any) -> LossScaleState | None:
    """The `LossScaleState` in an optimizer state, however deep it is chained; None when there is none."""
    leaves = jax.tree.leaves(opt_state, is_leaf=_is_scale)
    return next((leaf for leaf in leaves if _is_scale(leaf)), None)


def loss_scale_of(opt_state: Any) -> Float[Array, ""]:
    """What the next loss must be multiplied by; 1 without a loss scale."""
    state = loss_scale_state(opt_state)
    return jnp.ones((), jnp.float32) if state is None else state.scale


def replace_loss_scale(opt_state: Any, new: LossScaleState) -> Any:
    """The optimizer state with its `LossScaleState` replaced."""
    return jax.tree.map(lambda leaf: new if _is_scale(leaf) else leaf, opt_state, is_leaf=_is_scale)


def _is_scale(node: Any) -> bool:
    return isinstance(node, LossScaleState)


class Retries(NamedTuple):
    """Constants of `retry`; the last two as in `dynamic_loss_scale`.

    Attributes:
        limit: recomputations of one batch at most; 0 never recomputes.
        backoff_factor: shrinkage of the scale before each.
        min_scale: floor, where recomputing would only repeat the overflow.
    """

    limit: int = 0
    backoff_factor: float = 0.5
    min_scale: float = 1.0


NO_RETRIES = Retries()


class _Attempt(NamedTuple):
    count: Int[Array, ""]
    scale: Float[Array, ""]
    first: Int[Array, ""]
    culprit: Int[Array, ""]
    value: Any


def retry(
    compute: Callable[[Float[Array, ""]], tuple[Int[Array, ""], Value]], state: LossScaleState, retries: Retries
) -> tuple[Int[Array, ""], Int[Array, ""], Value, LossScaleState]:
    """Computes again with a smaller scale while the result is not finite, so that no batch is dropped.

    One while loop whose body is compiled once. The scale moves as if each attempt had been a step, and a success
    after that starts its growth again.

    Args:
        compute: scale -> (-1 or the number of what is not finite, gradients and whatever belongs to them).
        state: of the loss scale before the step.
        retries: how often and how far down.

    Returns:
        First and last attempt's culprit (-1 = none), the last one's value, and the state whose scale it carries.
    """

    def unfinished(last: _Attempt) -> Array:
        worth = (last.count <= retries.limit) & (last.scale > retries.min_scale)
        return (last.count == 0) | ((last.culprit >= 0) & worth)

    def attempt(last: _Attempt) -> _Attempt:
        smaller = jnp.maximum(last.scale * retries.backoff_factor, retries.min_scale)
        scale = jnp.where(last.count == 0, last.scale, smaller)
        culprit, value = compute(scale)
        return _Attempt(last.count + 1, scale, jnp.where(last.count == 0, culprit, last.first), culprit, value)

    shape = jax.eval_shape(compute, state.scale)[1]
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)
    none = jnp.full((), -1, jnp.int32)
    last = jax.lax.while_loop(unfinished, attempt, _Attempt(jnp.zeros((), jnp.int32), state.scale, none, none, nothing))
    extra = last.count - 1
    state = state._replace(
        scale=last.scale,
        tracker=jnp.where(extra > 0, 0, state.tracker),
        retried=state.retried + extra,
    )
    return last.first, last.culprit, last.value, state
