"""The programs of a run: train step, evaluation step and span evaluation, all with one path of attention.

Where `model.attention: auto` may choose cuDNN, they are compiled before the first step, so that a plan that cuDNN
refuses changes the path of the whole run and not of what comes after. Out of scope: samples, which decode
(`jaxllm.generation.fallback`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jaxllm.config import RunConfig
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.models import init_params
from jaxllm.sharding import state_shardings
from jaxllm.training.compiled import AttentionRefused, CompiledOnce, by_blocks
from jaxllm.training.loss import Batch, build_loss
from jaxllm.training.loss_scale import Retries
from jaxllm.training.precision import build_model, compute_dtype
from jaxllm.training.spans import SpanEvaluation
from jaxllm.training.train_step import TrainState, init_train_state, make_eval_step, make_train_step

_log = logging.getLogger(__name__)


class Programs:
    """What a run compiles.

    Attributes:
        config: the run; after `compile`, with the attention that it takes.
        model: in the run's dtypes.
        abstract: shapes of the state.
        train_step: updates the state in place.
        eval_step: sums over one batch.
        spans: T5's spans that are guessed whole.
    """

    def __init__(
        self,
        config: RunConfig,
        optimizer: optax.GradientTransformation,
        tokenizer: Tokenizer,
        *,
        mesh: Mesh | None,
        check: Callable[[int], None],
    ) -> None:
        """Compiles nothing yet; `check` is told how many bytes the train step needs before it runs."""
        self._optimizer, self._tokenizer, self._mesh, self._check = optimizer, tokenizer, mesh, check
        self.config, self.model = config, build_model(config)
        self.abstract = jax.eval_shape(self.fresh)
        self._build(config)

    def fresh(self) -> TrainState:
        """The state of a run that starts from nothing."""
        return self.state_of(init_params(self.model, jax.random.split(jax.random.key(self.config.training.seed))[0]))

    def state_of(self, params: Any) -> TrainState:
        """The state of a run that starts from these parameters."""
        _, key = jax.random.split(jax.random.key(self.config.training.seed))
        return init_train_state(params, self._optimizer, key)

    def compile(self, state: TrainState, batch: Callable[[], Batch]) -> None:
        """Compiles all, where cuDNN might refuse an attention; then all take blocks in plain JAX instead.

        Elsewhere each is compiled when it is first used. `batch` gives arrays such as those that come.

        Raises:
            AttentionRefused: when `model.attention: cudnn` is refused.
            FitError: when the device has too little memory.
        """
        if not _may_be_refused(self.config):
            return
        placed = batch()
        try:
            self._compile(state, placed)
        except AttentionRefused as error:
            if self.config.model.attention != "auto":
                raise
            _log.warning("attention: chunked instead of auto for this run, because %s", str(error).split(";")[0])
            self._build(by_blocks(self.config))
            self._compile(state, placed)

    def _build(self, config: RunConfig) -> None:
        mesh, dtype, accumulation = self._mesh, compute_dtype(config.precision), config.training.accumulation
        self.config, self.model = config, build_model(config)
        loss = build_loss(self.model, config.training)
        retries = Retries(config.precision.retries, min_scale=config.precision.min_scale)
        step = make_train_step(
            loss, self._optimizer, accumulation=accumulation, dtype=dtype, retries=retries, mesh=mesh
        )
        # A step's new state stays where the old one is, whatever XLA would prefer.
        layout = {} if mesh is None else {"out_shardings": (state_shardings(self.abstract, mesh), None)}
        self.train_step = CompiledOnce(step, name="train step", check=self._check, donate_argnums=0, **layout)
        self.eval_step = CompiledOnce(make_eval_step(loss, dtype=dtype, mesh=mesh), name="evaluation step")
        self.spans = SpanEvaluation(self.model, self._tokenizer, dtype=dtype, mesh=mesh)

    def _compile(self, state: TrainState, batch: Batch) -> None:
        """The train step last: its check is the last that can refuse the run."""
        self.eval_step.prepare(state.params, batch)
        self.spans.prepare(state.params, batch)
        self.train_step.prepare(state, batch)


def _may_be_refused(config: RunConfig) -> bool:
    return jax.default_backend() == "gpu" and config.model.attention in ("auto", "cudnn")
