"""The compiled steps of a run: train step, evaluation step and span evaluation, all with one path of attention.

Where `model.attention: auto` may choose cuDNN, they are compiled before the first step, so that a plan that cuDNN
refuses changes the path of the whole run and not of what comes after. Out of scope: samples, which decode
(`jaxllm.generation.fallback`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from jaxllm.config import RunConfig
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.ops import backend
from jaxllm.run.compiled import AttentionRefused, CompiledOnce, by_blocks
from jaxllm.run.spans import SpanEvaluation
from jaxllm.training.loss import Batch
from jaxllm.training.program import program_of
from jaxllm.training.sharding import state_shardings

_log = logging.getLogger(__name__)


class Steps:
    """What a run compiles.

    Attributes:
        program: the pure functions; after `compile`, with the attention that the run takes.
        train_step: updates the state in place.
        eval_step: sums over one batch.
        spans: spans of an encoder-decoder that are predicted whole.
    """

    def __init__(
        self, config: RunConfig, tokenizer: Tokenizer, *, mesh: Mesh | None, check: Callable[[int], None]
    ) -> None:
        """Compiles nothing yet; `check` is told how many bytes the train step needs before it runs."""
        self._tokenizer, self._mesh, self._check = tokenizer, mesh, check
        self._build(config)

    def compile(self, state: Any, batch: Callable[[], Batch]) -> None:
        """Compiles all, where cuDNN might refuse an attention; then all take blocks in plain JAX instead.

        Elsewhere each is compiled when it is first used. `batch` gives arrays such as those that come.

        Raises:
            AttentionRefused: when `model.attention: cudnn` is refused.
            FitError: when the device has too little memory.
        """
        config = self.program.config
        if not _may_be_refused(config):
            return
        placed = batch()
        try:
            self._compile(state, placed)
        except AttentionRefused as error:
            if config.model.attention != "auto":
                raise
            _log.warning("attention: chunked instead of auto for this run, because %s", str(error).split(";")[0])
            self._build(by_blocks(config))
            self._compile(state, placed)

    def _build(self, config: RunConfig) -> None:
        self.program = program = program_of(config, self._mesh)
        layout: dict[str, Any] = {}
        if self._mesh is not None:  # a step's new state stays where the old one is, whatever XLA would prefer
            layout = {"out_shardings": (state_shardings(program.abstract_state(), self._mesh), None)}
        self.train_step = CompiledOnce(
            program.train_step, name="train step", check=self._check, donate_argnums=0, **layout
        )
        self.eval_step = CompiledOnce(program.eval_step, name="evaluation step")
        self.spans = SpanEvaluation(program.model, self._tokenizer, dtype=program.dtype, mesh=self._mesh)

    def _compile(self, state: Any, batch: Batch) -> None:
        """The train step last: its check is the last that can refuse the run."""
        self.eval_step.prepare(state.params, batch)
        self.spans.prepare(state.params, batch)
        self.train_step.prepare(state, batch)


def _may_be_refused(config: RunConfig) -> bool:
    return backend.on_gpu() and config.model.attention in ("auto", "cudnn")
