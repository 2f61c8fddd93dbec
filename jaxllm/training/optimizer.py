"""Learning-rate schedules and the chain clip -> moments -> weight decay -> learning rate, from `OptimizerConfig`.

optax has the rules; this module decides their order and which parameters decay. The loss scale is around the whole
chain, so that clipping applies to unscaled gradients.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from jaxllm.config import OptimizerConfig, PrecisionConfig, RunConfig
from jaxllm.training.fingerprint import path_name
from jaxllm.training.names import MATRIX, is_stacked, role_of
from jaxllm.training.precision import dynamic_loss_scale, static_loss_scale


def build_schedule(config: OptimizerConfig, *, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then the configured shape, down to its floor at `steps`.

    A run that is shorter than warm-up and decay shortens both, see `phases`.

    >>> schedule = build_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=2, schedule="cosine"), steps=10)
    >>> [round(float(schedule(step)), 2) for step in (0, 1, 6, 10)]
    [0.5, 1.0, 0.55, 0.1]
    """
    warmup, decay = phases(config, steps=steps)
    if (warmup, decay) != (config.warmup_steps, config.decay_steps):
        config = dataclasses.replace(config, warmup_steps=warmup, decay_steps=decay)
    peak = config.learning_rate
    after = _named(SCHEDULES, config.schedule, "schedule")(config, max(steps - warmup, 1))
    if warmup == 0:
        return after
    # Step 0 uses peak / warmup, so that it changes the parameters.
    ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([ramp, after], [warmup])


def phases(config: OptimizerConfig, *, steps: int) -> tuple[int, int]:
    """Steps of warm-up and of wsd's decay; shortened by the same factor where together they exceed the run.

    >>> config = OptimizerConfig(schedule="wsd", warmup_steps=40, decay_steps=140)
    >>> phases(config, steps=360), phases(config, steps=18)
    ((40, 140), (4, 14))
    """
    warmup, decay = config.warmup_steps, config.decay_steps
    wanted = warmup + (decay if config.schedule == "wsd" else 0)  # no other schedule reads decay_steps
    if wanted <= steps:
        return warmup, decay
    shorter = warmup * steps // wanted
    return shorter, steps - shorter if config.schedule == "wsd" else decay


def same_rates(one: RunConfig, other: RunConfig, *, steps: int) -> bool:
    """Whether two runs have the same learning rates in their first steps."""
    count = jnp.arange(steps)
    before, after = (
        jax.vmap(build_schedule(each.optimizer, steps=each.training.steps))(count) for each in (one, other)
    )
    return bool(jnp.array_equal(before, after))


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
    parts += [_scale_by_name(config.rate_factors)] if config.rate_factors else []
    return wrapped(optax.chain(*parts), config, precision)


def wrapped(
    inner: optax.GradientTransformation, config: OptimizerConfig, precision: PrecisionConfig
) -> optax.GradientTransformation:
    """An optimizer with the average of `optimizer.ema`, inside the loss scale of `precision.loss_scale`, if any."""
    inner = with_average(inner, config.ema) if config.ema else inner
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


class AverageState(NamedTuple):
    """The average of the parameters in float32, laid out over devices as they are, and the state of the wrapped rule.

    `jaxllm.storage.checkpoint.load_params` finds it by its name.
    """

    count: Int[Array, ""]  # steps in it
    average_of_params: Any
    inner: Any


def with_average(inner: optax.GradientTransformation, decay: float) -> optax.GradientTransformationExtraArgs:
    """Wraps a rule so that its state also has an exponential average of the parameters that its updates make.

        a_t = a_(t-1) + (1 - d) / (1 - d^t) * (p_t - a_(t-1)),  so that  a_t = sum_i d^(t-i) p_i / sum_i d^(t-i)

    The weights sum to 1 from the first step on, as in Adam's bias correction (arXiv 1412.6980 section 3).

    >>> rule = with_average(optax.sgd(1.0), 0.5)
    >>> params, state = {"w": jnp.float32(0.0)}, rule.init({"w": jnp.float32(0.0)})
    >>> for _ in range(2):  # to 1, then to 2
    ...     updates, state = rule.update({"w": jnp.float32(-1.0)}, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> print(f"{evaluated(params, state)['w']:.3f}")  # (0.5 * 1 + 2) / 1.5
    1.667
    """
    rule = optax.with_extra_args_support(inner)

    def init(params: Any) -> AverageState:
        # Copies: donation refuses one buffer given twice.
        copied = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
        return AverageState(jnp.zeros((), jnp.int32), copied, rule.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, AverageState]:
        updates, inside = rule.update(updates, state.inner, params, **extra)
        count = state.count + 1
        rate = (1 - decay) / -jnp.expm1(count * math.log(decay))
        after = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: a + rate * (p - a), state.average_of_params, after)
        return updates, AverageState(count, average, inside)

    return optax.GradientTransformationExtraArgs(init, update)


def evaluated(params: Any, opt_state: Any) -> Any:
    """The average in an optimizer state, at any depth; the parameters where there is none."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, AverageState))
    return next((node.average_of_params for node in nodes if isinstance(node, AverageState)), params)


def _adamw(config: OptimizerConfig) -> list[optax.GradientTransformation]:
    return [_stored_first_moment(optax.scale_by_adam(config.b1, config.b2, config.eps), config.moment_dtype)]


def _muon(config: OptimizerConfig) -> list[optax.GradientTransformation]:
    """Muon for the matrices of the layers, Adam for embedding, head, norms and biases.

    Muon's updates are scaled to the RMS of Adam's, so that one learning rate and one weight decay fit both. Sources:
    github.com/KellerJordan/Muon; arXiv 2502.16982 section 2.2.
    """

    def kinds(params: Any) -> Any:
        def kind(path: tuple[Any, ...], _: Any) -> str:
            return "muon" if is_stacked(path) and role_of(path) == MATRIX else "adam"

        return jax.tree_util.tree_map_with_path(kind, params)

    def by_layer(updates: Any, _: Any) -> Any:  # several devices gather one matrix at a time
        return jax.tree.map(lambda stack: jax.lax.map(_orthogonal, stack), updates)

    momentum = _stored_first_moment(optax.trace(config.momentum, nesterov=True), config.moment_dtype, name="trace")
    matrices = optax.chain(momentum, optax.stateless(by_layer))
    return [optax.partition({"muon": matrices, "adam": _adamw(config)[0]}, kinds)]


def _orthogonal(update: jax.Array) -> jax.Array:
    """A matrix with all singular values near 1, by five Newton-Schulz steps, then with the RMS of Adam's updates.

    optax.contrib.muon corrects the bias of its momentum, and so differs from torch's and the original in early steps.
    """
    long = max(update.shape[-2:])
    x = update if update.shape[-1] == long else update.mT
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=(-2, -1), keepdims=True), 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x
    return 0.2 * math.sqrt(long) * (x if update.shape[-1] == long else x.mT)


# `OptimizerConfig.name` -> the rules from clipped gradients to an update, before weight decay and learning rate.
OPTIMIZERS: dict[str, Callable[[OptimizerConfig], list[optax.GradientTransformation]]] = {
    "adamw": _adamw,
    "adamw_rms": lambda config: [*_adamw(config), scale_by_parameter_rms()],
    # Not optax.adafactor, whose weight decay is not multiplied by the learning rate.
    "adafactor": lambda _: [optax.scale_by_factored_rms(), _clip_by_rms(1.0), scale_by_parameter_rms()],
    "muon": _muon,
}


def _named(table: Mapping[str, Any], name: str, setting: str) -> Any:
    if name not in table:
        raise ValueError(f"optimizer.{setting} {name!r} is not implemented; known: {', '.join(table)}")
    return table[name]


def _scale_by_name(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies the updates of the parameters whose path has a name, such as embed or layers/mlp."""

    def factor(path: tuple[Any, ...]) -> float:
        whole = f"/{path_name(path)}/"
        return math.prod((value for name, value in factors.items() if f"/{name}/" in whole), start=1.0)

    def init(params: Any) -> optax.EmptyState:
        paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        absent = [name for name in factors if not any(f"/{name}/" in f"/{path}/" for path in paths)]
        if absent:
            known = ", ".join(dict.fromkeys(paths))
            raise ValueError(f"optimizer.rate_factors has {absent[0]!r}, which is in no path of {known}")
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree_util.tree_map_with_path(lambda path, x: factor(path) * x, updates), state

    return optax.GradientTransformation(init, update)


def _stored_first_moment(
    rule: optax.GradientTransformation, dtype: str, *, name: str = "mu"
) -> optax.GradientTransformation:
    """A rule that keeps its first moment, `name` in its state, in `dtype` between steps and computes in float32.

    optax's own option multiplies the stored moment by b1 in that dtype. In bfloat16 a b1 of 0.99 is 0.9883, and every
    update is an eighth too small. A b1 of 0.999 is 1, and old gradients never decay.
    """
    if dtype == "float32":
        return rule

    def kept(state: Any, kind: Any) -> Any:
        return state._replace(**{name: jax.tree.map(lambda x: x.astype(kind), getattr(state, name))})

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = rule.update(updates, kept(state, jnp.float32), params)
        return updates, kept(state, dtype)

    return optax.GradientTransformation(lambda params: kept(rule.init(params), dtype), update)


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
