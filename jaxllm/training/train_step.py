"""One optimizer step as a pure function: (state, batch) -> (state, metrics).

Loss functions return sums, which are divided once by the weight of the whole batch, so that accumulating microbatches
of different weight is exact. On one device parameters are cast to the compute dtype once per step, outside the
accumulation scan; on several, where they are gathered. The caller applies jit, donation and layout: see the example of
`jaxllm.training.program`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxllm.ops.losses import LossSums
from jaxllm.training.attribution import first_nonfinite, group_norms
from jaxllm.training.loss import Batch, LossFunction
from jaxllm.training.optimizer import evaluated
from jaxllm.training.precision import cast_floating, loss_scale_of, loss_scale_state, unscale
from jaxllm.training.sharding import AnyMesh, device_keys, map_rows, sum_gradients, total, with_ends

T = TypeVar("T")
COUNTS = "counts"  # of each row, next to the arrays of a batch


class TrainState(NamedTuple):
    """The arrays that a step changes and a checkpoint holds."""

    step: Int[Array, ""]  # optimizer steps done
    params: Any  # float32 master weights
    opt_state: Any  # of the optimizer, the loss scale included
    key: Array  # typed PRNG key of the run; steps fold their number into it and leave it unchanged

    @property
    def evaluated(self) -> Any:
        """The parameters, or their average with `optimizer.ema`."""
        return evaluated(self.params, self.opt_state)


class StepMetrics(NamedTuple):
    """Float32 scalars of one step."""

    loss: Float[Array, ""]  # the minimised sum per unit of weight
    nll: Float[Array, ""]  # cross-entropy in nats per unit of weight
    accuracy: Float[Array, ""]  # fraction of the weight whose target had the largest logit
    weight: Float[Array, ""]  # sum of the weights
    grad_norm: Float[Array, ""]  # global norm of the unscaled gradient, before clipping
    loss_scale: Float[Array, ""]  # factor of this step's loss
    skipped: Float[Array, ""]  # steps skipped since the start, this one included
    at_floor: Float[Array, ""]  # overflows in a row with the scale at its floor
    # index of the first non-finite group in `gradient_groups`, -1 when all were finite or without a scale
    culprit: Float[Array, ""]
    counts: Any = None  # [2], see `with_counts`


def init_train_state(params: Any, optimizer: optax.GradientTransformation, key: Array) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), key)


def make_train_step(
    loss_function: LossFunction,
    optimizer: optax.GradientTransformation,
    *,
    accumulation: int,
    dtype: Any,
    mesh: AnyMesh | None = None,
    result: Callable[[TrainState, StepMetrics, Any, Any, Any], T] = lambda after, metrics, *_: (after, metrics),
) -> Callable[[TrainState, Batch], T]:
    """The pure step of a run: forward, backward, update.

    >>> def loss(params, batch, key):  # of a line through the origin
    ...     squares = batch["weights"] * (params["slope"] * batch["x"] - batch["y"]) ** 2
    ...     return LossSums(squares.sum(), squares.sum(), batch["weights"].sum(), jnp.zeros(()))
    >>> rule = optax.sgd(0.1)
    >>> step = jax.jit(make_train_step(loss, rule, accumulation=2, dtype=jnp.float32))
    >>> state = init_train_state({"slope": jnp.zeros(())}, rule, jax.random.key(0))
    >>> x = jnp.arange(4.0)
    >>> state, metrics = step(state, {"x": x, "y": 2 * x, "weights": jnp.ones(4)})
    >>> print(metrics.loss, metrics.weight, state.params["slope"])
    14.0 4.0 1.4

    Args:
        loss_function: (parameters in `dtype`, microbatch, key) -> `LossSums`.
        optimizer: takes gradients scaled by its own loss scale, if it has one.
        accumulation: microbatches of a batch. Its arrays, `weights` among them, are split along their leading axis.
        dtype: compute dtype.
        mesh: devices that hold state and batch, see `jaxllm.training.sharding`; None is one.
        result: what the step returns of the new state, its metrics, old parameters, scaled gradients and updates.
    """
    loss, options = with_ends(loss_function), {"accumulation": accumulation, "device_keys": device_keys(mesh)}

    def gradients(params: Any, batch: Batch, key: Array, scale: Array, weight: Array) -> tuple[LossSums, Any]:
        return accumulate_gradients(loss, params, batch, key, factor=scale / weight, **options)

    accumulate = map_rows(gradients, mesh, dtype=dtype, combine=sum_gradients)
    rule = optax.with_extra_args_support(optimizer)

    def train_step(state: TrainState, batch: Batch) -> T:
        key = jax.random.fold_in(state.key, state.step)
        weight = total_weight(batch)
        scale = loss_scale_of(state.opt_state)
        sums, grads = accumulate(state.params, batch, key, scale, weight)
        culprit, known = jnp.full((), -1, jnp.int32), {}
        if loss_scale_state(state.opt_state) is not None:
            culprit = first_nonfinite(unscale(grads, scale))
            known = {"finite": culprit < 0}  # spares the loss scale a pass over the gradients
        updates, opt_state = rule.update(grads, state.opt_state, state.params, **known)
        scaling = loss_scale_state(opt_state)
        counts = (0, 0) if scaling is None else (scaling.skipped, scaling.at_floor)
        skipped, at_floor, number = (jnp.asarray(count, jnp.float32) for count in (*counts, culprit))
        metrics = StepMetrics(
            loss=sums.loss / weight,
            nll=sums.nll / weight,
            accuracy=sums.correct / weight,
            weight=sums.weight,
            grad_norm=optax.tree.norm(unscale(grads, scale)),
            loss_scale=scale,
            skipped=skipped,
            at_floor=at_floor,
            culprit=number,
        )
        after = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state, state.key)
        return result(after, metrics, state.params, grads, updates)

    return train_step


def norms(_: TrainState, metrics: StepMetrics, params: Any, grads: Any, updates: Any) -> Float[Array, "3 G"]:
    """Norms of the unscaled gradient, the weight and the update of each group, a `result` of `make_train_step`."""
    return jnp.stack([group_norms(tree) for tree in (unscale(grads, metrics.loss_scale), params, updates)])


def without_counts(batch: Batch) -> Batch:
    """The arrays that a model reads."""
    return {name: rows for name, rows in batch.items() if name != COUNTS}


def with_counts(train_step: Callable[..., Any]) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """The step of a batch with `COUNTS` [B, 2], which it sums over all rows; each process supplies its own."""

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        state, metrics = train_step(state, without_counts(batch))
        return state, metrics._replace(counts=batch[COUNTS].sum(0))

    return step


def total_weight(batch: Batch) -> Float[Array, ""]:
    """The weight of a batch, by which its sums are divided; 1 if nothing in it counts."""
    weight = jnp.sum(batch["weights"], dtype=jnp.float32)
    return jnp.where(weight > 0, weight, 1.0)


def accumulate_gradients(
    loss_function: LossFunction,
    params: Any,
    batch: Batch,
    key: Array,
    *,
    factor: Array,
    accumulation: int,
    device_keys: Callable[[Array], Array] = lambda keys: keys,
) -> tuple[LossSums, Any]:
    """Sums over microbatches of the loss, and float32 gradients of factor * loss.

    `device_keys` maps the key of the batch, or those of its microbatches, to keys of these rows of it.
    """

    def scaled(p: Any, part: Batch, part_key: Array) -> tuple[Array, LossSums]:
        sums = loss_function(p, part, part_key)
        return sums.loss * factor, sums

    def gradient(part: Batch, part_key: Array) -> tuple[LossSums, Any]:
        (_, sums), grads = jax.value_and_grad(scaled, has_aux=True)(params, part, part_key)
        return sums, cast_floating(grads, jnp.float32)

    if accumulation == 1:
        return gradient(batch, device_keys(key))

    def body(total: tuple[LossSums, Any], inputs: tuple[Batch, Array]) -> tuple[tuple[LossSums, Any], None]:
        return jax.tree.map(jnp.add, total, gradient(*inputs)), None

    parts = jax.tree.map(lambda x: x.reshape(accumulation, -1, *x.shape[1:]), batch)
    keys = device_keys(jax.random.split(key, accumulation))
    first = jax.tree.map(lambda x: x[0], (parts, keys))  # of `loss_function`: `gradient` takes twice as long to trace
    like = jax.eval_shape(lambda *inputs: (loss_function(params, *inputs), cast_floating(params, jnp.float32)), *first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    return jax.lax.scan(body, zeros, (parts, keys))[0]


def make_eval_step(
    loss_function: LossFunction, *, dtype: Any, mesh: AnyMesh | None = None
) -> Callable[[Any, Batch], LossSums]:
    """(parameters, batch) -> the loss sums of a batch, without gradients and without dropout.

    >>> def loss(params, batch, key):
    ...     total = jnp.sum(params["w"] * batch["x"])
    ...     return LossSums(total, total, jnp.float32(batch["x"].size), jnp.zeros(()))
    >>> sums = make_eval_step(loss, dtype=jnp.bfloat16)({"w": jnp.float32(2)}, {"x": jnp.ones(3)})
    >>> print(sums.loss / sums.weight)
    2.0
    """

    def eval_step(params: Any, batch: Batch) -> LossSums:
        return with_ends(loss_function)(params, batch, None)

    return map_rows(eval_step, mesh, dtype=dtype, combine=total)
