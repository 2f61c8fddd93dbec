"""Learning-rate schedules and the chain clip -> moments -> weight decay -> learning rate, from `OptimizerConfig`.

optax has the rules; this module decides their order and which parameters decay. The loss scale is around the whole
chain, so that clipping applies to unscaled gradients.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxllm.config import OptimizerConfig, PrecisionConfig
from jaxllm.training.loss_scale import dynamic_loss_scale, static_loss_scale
from jaxllm.training.names import is_stacked, role_of


def build_schedule(config: OptimizerConfig, *, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then the configured shape, down to its floor at `steps`.

    >>> schedule = build_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=2, schedule="cosine"), steps=10)
    >>> [round(float(schedule(step)), 2) for step in (0, 1, 6, 10)]
    [0.5, 1.0, 0.55, 0.1]
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    after = _named(SCHEDULES, config.schedule, "schedule")(config, max(steps - warmup, 1))
    if warmup == 0:
        return after
    # Step 0 uses peak / warmup, so that it changes the parameters.
    ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([ramp, after], [warmup])


def _stable_then_decay(config: OptimizerConfig, steps: int) -> optax.Schedule:
    peak = config.learning_rate
    decay = optax.linear_schedule(peak, peak * config.min_lr_ratio, config.decay_steps)
    return optax.join_schedules([optax.constant_schedule(peak), decay], [steps - config.decay_steps])


def _inverse_sqrt(config: OptimizerConfig, steps: int) -> optax.Schedule:
    peak, offset = config.learning_rate, max(config.warmup_steps, 1)
    return lambda count: peak * jnp.sqrt(offset / (jnp.maximum(count, 0) + offset))


# `OptimizerConfig.schedule` -> the learning rate after the warm-up, from the config and the remaining steps.
SCHEDULES: dict[str, Callable[[OptimizerConfig, int], optax.Schedule]] = {
    "cosine": lambda by, steps: optax.cosine_decay_schedule(by.learning_rate, steps, alpha=by.min_lr_ratio),
    "wsd": _stable_then_decay,
    "inverse_sqrt": _inverse_sqrt,
    "constant": lambda by, steps: optax.constant_schedule(by.learning_rate),
}


def decay_mask(params: Any) -> Any:
    """True for matrices, which weight decay shrinks; False for norms, biases and relative bias tables.

    >>> decay_mask({"lm_head": jnp.ones((2, 2)), "final_norm": {"weight": jnp.ones(2)}})
    {'final_norm': {'weight': False}, 'lm_head': True}
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: role_of(path).decayed, params)


def build_optimizer(config: OptimizerConfig, precision: PrecisionConfig, *, steps: int) -> optax.GradientTransformation:
    """The update rule of a run over `steps` steps, with its loss scale around it.

    >>> rule = build_optimizer(OptimizerConfig(learning_rate=0.5, schedule="constant"), PrecisionConfig(), steps=10)
    >>> params = {"lm_head": jnp.ones((2, 2))}
    >>> updates, state = rule.update({"lm_head": jnp.full((2, 2), 3.0)}, rule.init(params), params)
    >>> print(f"{updates['lm_head'][0, 0]:.2f}")  # -0.5 * (Adam's 1 + weight decay's 0.1)
    -0.55
    """
    schedule = build_schedule(config, steps=steps)
    parts = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    parts += _named(OPTIMIZERS, config.name, "name")(config)
    parts.append(optax.add_decayed_weights(config.weight_decay, mask=decay_mask))
    parts.append(optax.scale_by_learning_rate(schedule))
    inner = optax.chain(*parts)
    if precision.loss_scale == "dynamic":
        return dynamic_loss_scale(
            inner,
            initial_scale=precision.initial_scale,
            growth_interval=precision.growth_interval,
            min_scale=precision.min_scale,
            max_scale=precision.max_scale,
            hysteresis=precision.hysteresis,
        )
    if precision.loss_scale == "static":
        return static_loss_scale(inner, precision.initial_scale)
    return inner


def _adamw(config: OptimizerConfig) -> list[optax.GradientTransformation]:
    return [_stored_first_moment(optax.scale_by_adam(config.b1, config.b2, config.eps), config.moment_dtype)]


# `OptimizerConfig.name` -> the rules from clipped gradients to an update, before weight decay and learning rate.
OPTIMIZERS: dict[str, Callable[[OptimizerConfig], list[optax.GradientTransformation]]] = {
    "adamw": _adamw,
    "adamw_rms": lambda config: [*_adamw(config), scale_by_parameter_rms()],
    # Not optax.adafactor, whose weight decay is not multiplied by the learning rate.
    "adafactor": lambda _: [optax.scale_by_factored_rms(), _clip_by_rms(1.0), scale_by_parameter_rms()],
}


def _named(table: Mapping[str, Any], name: str, setting: str) -> Any:
    if name not in table:
        raise ValueError(f"optimizer.{setting} {name!r} is not implemented; known: {', '.join(table)}")
    return table[name]


def _stored_first_moment(adam: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """Adam that keeps its first moment in `dtype` between steps and computes with it in float32.

    optax's `mu_dtype` multiplies the stored moment by b1 in that dtype. In bfloat16 a b1 of 0.99 is 0.9883, and every
    update is an eighth too small. A b1 of 0.999 is 1, and old gradients never decay.
    """
    if dtype == "float32":
        return adam

    def kept(state: Any, kind: Any) -> Any:
        return state._replace(mu=jax.tree.map(lambda x: x.astype(kind), state.mu))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = adam.update(updates, kept(state, jnp.float32), params)
        return updates, kept(state, dtype)

    return optax.GradientTransformation(lambda params: kept(adam.init(params), dtype), update)


def _clip_by_rms(largest: float) -> optax.GradientTransformation:
    """Scales each tensor's update down to an RMS of `largest`, each layer of a stack by itself (1804.04235 section 6).

    optax.clip_by_block_rms would clip the stacked tensor as a whole, in which one layer's spike disappears.
    """

    def clip(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        return update / jnp.maximum(1.0, _rms(path, update) / largest)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(clip, updates))


def _rms(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
    """Root of the mean square of a tensor, or of each layer of a stack, in float32."""
    axes = tuple(range(1 if is_stacked(path) else 0, x.ndim))
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=axes, keepdims=True))


def scale_by_parameter_rms(minimum: float = 1e-3) -> optax.GradientTransformation:
    """Multiplies each tensor's update by max(RMS(parameter), minimum), one RMS per layer of a stack.

    With Adafactor's parameter scaling on Adam (AdamW-RMS of nanoT5) one learning rate fits T5's differently sized
    tensors. Source: arXiv 1804.04235 section 8.
    """

    def scale(path: tuple[Any, ...], update: jax.Array, param: jax.Array) -> jax.Array:
        return update * jnp.maximum(_rms(path, param), minimum).astype(update.dtype)

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(scale, updates, params))
