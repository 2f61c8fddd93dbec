"""How many masked spans an encoder-decoder guesses whole, under teacher forcing.

A span counts when each of its tokens and the mark that ends it (the next sentinel, or the end) is the most likely one
given the true tokens before it. Where nothing is hidden by sentinels, a whole answer is one span.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from jaxllm.data.packing import segments_of
from jaxllm.data.tokenizer import Tokenizer
from jaxllm.models import Model, family_of
from jaxllm.models.layers import apply
from jaxllm.ops.sampling import most_probable
from jaxllm.run.compiled import CompiledOnce
from jaxllm.training.loss import Batch
from jaxllm.training.precision import cast_floating
from jaxllm.training.sharding import map_rows


class SpanCounts(NamedTuple):
    """Spans of a batch.

    Attributes:
        exact: spans guessed whole.
        total: all of them.
    """

    exact: int
    total: int


def make_predict_step(
    model: Model, *, dtype: Any, mesh: Mesh | None = None
) -> Callable[[Any, Batch], Int[Array, "B T"]]:
    """The most likely token at every decoder position, given the true ones before; logits exist row by row."""

    def on_rows(cast: Any, batch: Batch) -> Int[Array, "B T"]:
        head = apply(model, cast, method="head")
        hidden = family_of(model).hidden(model, cast, batch)
        return jax.lax.map(lambda row: most_probable(jnp.einsum("td,vd->tv", row, head)), hidden)

    spread = map_rows(on_rows, mesh, summed=False)

    def predict(params: Any, batch: Batch) -> Int[Array, "B T"]:
        return spread(cast_floating(params, dtype), batch)

    return predict


def count_spans(
    predicted: np.ndarray, targets: np.ndarray, segment_ids: np.ndarray, sentinels: np.ndarray
) -> SpanCounts:
    """Spans of rows [B, T]; one begins after a sentinel, or with an answer that does not begin with a sentinel."""
    inside = segment_ids.ravel() > 0
    row = np.repeat(np.arange(len(targets)), targets.shape[1])
    owner = (row * (1 + segment_ids.max(initial=0)) + segment_ids.ravel())[inside]
    tokens, right = targets.ravel()[inside], (predicted == targets).ravel()[inside]
    marks = np.isin(tokens, sentinels)
    first = np.diff(owner, prepend=-1) != 0
    begins = first | np.roll(marks, 1)
    number = np.cumsum(begins) - 1
    # What only announces the first span is none itself.
    real = ~(first & marks)[begins]
    whole = np.bincount(number, weights=~right, minlength=len(real)) == 0
    return SpanCounts(int((whole & real).sum()), int(real.sum()))


class SpanEvaluation:
    """Adds up `spans_exact` over batches; of a decoder-only model, nothing."""

    def __init__(self, model: Model, tokenizer: Tokenizer, *, dtype: Any, mesh: Mesh | None = None) -> None:
        """`dtype` is that of the computation, `mesh` the devices that parameters and batches lie on."""
        self._predict = None
        if model.config.encoder_decoder:
            self._predict = CompiledOnce(make_predict_step(model, dtype=dtype, mesh=mesh), name="span evaluation")
        self._sentinels = tokenizer.sentinel_ids
        self.reset()

    def prepare(self, params: Any, placed: Batch) -> None:
        """Compiles what `add` will run on batches like this one."""
        if self._predict is not None:
            self._predict.prepare(params, placed)

    def reset(self) -> None:
        """Forgets earlier batches."""
        self._counts = SpanCounts(0, 0)

    def add(self, params: Any, batch: dict[str, np.ndarray], placed: Batch) -> None:
        """Counts the spans of one batch; `placed` is the same one where the step wants it."""
        if self._predict is None:
            return
        predicted = np.asarray(self._predict(params, placed))
        found = count_spans(predicted, batch["targets"], segments_of(batch)[1], self._sentinels)
        self._counts = SpanCounts(self._counts.exact + found.exact, self._counts.total + found.total)

    def result(self) -> dict[str, float]:
        """`spans_exact`: the share of spans guessed whole."""
        return {"spans_exact": self._counts.exact / self._counts.total} if self._counts.total else {}
