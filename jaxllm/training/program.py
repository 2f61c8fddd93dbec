"""A run's pure functions, assembled once from its config: model, loss, optimizer, train step, first state.

Everything that trains, measures or inspects a run takes them from here, and so uses the same program. This is enough
for your own training loop (`jaxllm.training.sharding` has one for several devices):

>>> import numpy as np
>>> from jaxllm.config import LlamaConfig, OptimizerConfig, RunConfig, TrainingConfig
>>> config = RunConfig(
...     model=LlamaConfig(vocab_size=16, d_model=8, d_ff=16, num_layers=1, num_heads=2),
...     optimizer=OptimizerConfig(learning_rate=0.05),
...     training=TrainingConfig(steps=20),
... )
>>> program = program_of(config)
>>> state = jax.jit(program.fresh_state)()
>>> step = jax.jit(program.train_step, donate_argnums=0)
>>> text = np.tile(np.arange(9, dtype=np.int32), (4, 1))
>>> batch = {"tokens": text[:, :-1], "targets": text[:, 1:], "weights": np.ones((4, 8), np.float32)}
>>> for _ in range(config.training.steps):
...     state, metrics = step(state, batch)
>>> int(state.step), bool(metrics.loss < 1)
(20, True)

`build_loss` describes batches. `CustomParts` replaces the loss, the optimizer or the objective.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from jaxllm.config import RunConfig, TrainingConfig
from jaxllm.data.recipes import RECIPES, Objective
from jaxllm.models import Model, abstract_params, init_params
from jaxllm.ops.losses import LossSums
from jaxllm.training.loss import Batch, LossFunction, build_loss
from jaxllm.training.optimizer import build_optimizer, wrapped
from jaxllm.training.precision import build_model, cast_floating
from jaxllm.training.sharding import AnyMesh
from jaxllm.training.train_step import StepMetrics, TrainState, init_train_state, make_eval_step, make_train_step, norms

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
EvalStep = Callable[[Any, Batch], LossSums]
NormsStep = Callable[[TrainState, Batch], Float[jax.Array, "3 G"]]
LossBuilder = Callable[[Model, TrainingConfig], LossFunction]


class CustomParts(NamedTuple):
    """Parts of a run that replace those of its config (docs/parts.md); None keeps that of the config."""

    loss: LossBuilder | None = None  # called as `build_loss`, and returns a pure function as that does
    optimizer: optax.GradientTransformation | None = None  # replaces all but the loss scale and optimizer.ema
    recipe: Objective | None = None  # replaces the row of `RECIPES` that `data.objective` names
    model: Callable[[Model], Model] | None = None  # such as `lambda model: model.clone(attend=...)`; the config stays


_NONE = CustomParts()


class Program(NamedTuple):
    """The pure functions of a run."""

    config: RunConfig  # of the run
    custom: CustomParts  # parts that are not the config's
    model: Model  # in its dtypes
    dtype: Any  # of activations and matmul inputs
    loss: LossFunction  # (parameters in `dtype`, batch, key) -> sums
    optimizer: optax.GradientTransformation  # clipping, moments, decay and learning rate, inside the loss scale
    train_step: TrainStep  # (state, batch) -> (state, metrics)
    eval_step: EvalStep  # (parameters, batch) -> sums
    norms: NormsStep  # (state, batch) -> norms of the step's gradient, weight and update by group

    def fresh_state(self) -> TrainState:
        """The state before the first step, from `training.seed`."""
        return self.state_of(init_params(self.model, self._keys()[0]))

    def state_of(self, params: Any) -> TrainState:
        """The state before the first step, with given parameters."""
        return init_train_state(cast_floating(params, jnp.float32), self.optimizer, self._keys()[1])

    def abstract_state(self) -> TrainState:
        """Shapes and dtypes of the state."""
        return jax.eval_shape(self.state_of, abstract_params(self.model))

    def abstract_batch(self, rows: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a batch of so many rows, of `training.batch_size` by default."""
        rows = self.config.training.batch_size if rows is None else rows
        fields = (self.custom.recipe or RECIPES[self.config.data.objective]).fields(self.config.data)
        return {name: jax.ShapeDtypeStruct((rows, *shape), dtype) for name, (shape, dtype) in fields.items()}

    def _keys(self) -> tuple[jax.Array, jax.Array]:
        init_key, run_key = jax.random.split(jax.random.key(self.config.training.seed))
        return init_key, run_key


def program_of(config: RunConfig, mesh: AnyMesh | None = None, custom: CustomParts = _NONE) -> Program:
    """The program of a run on the devices of a mesh, None for a single device; nothing is allocated or compiled.

    >>> from jaxllm.config import LlamaConfig, RunConfig
    >>> model = LlamaConfig(vocab_size=64, d_model=16, d_ff=32, num_layers=1, num_heads=2)
    >>> program = program_of(RunConfig(model=model))
    >>> program.abstract_batch()["tokens"].shape
    (8, 256)
    """
    training = config.training
    dtype = jnp.dtype(config.precision.compute)
    model = build_model(config) if custom.model is None else custom.model(build_model(config))
    if getattr(model, "config", None) != config.model:
        raise ValueError("model= must return a model of the same config, such as model.clone(attend=...)")
    loss = (custom.loss or build_loss)(model, training)
    if custom.optimizer is None:
        optimizer = build_optimizer(config.optimizer, config.precision, steps=training.steps)
    else:
        optimizer = wrapped(custom.optimizer, config.optimizer, config.precision)
    options: dict[str, Any] = {"accumulation": training.accumulation, "dtype": dtype, "mesh": mesh}
    step = make_train_step(loss, optimizer, **options)
    evaluate = make_eval_step(loss, dtype=dtype, mesh=mesh)
    observed = make_train_step(loss, optimizer, **options, result=norms)
    return Program(config, custom, model, dtype, loss, optimizer, step, evaluate, observed)
