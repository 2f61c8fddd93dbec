"""The validation of a run: loss, bits per byte, accuracy, and the spans that an encoder-decoder predicts whole."""

import math
from typing import Any

import jax
import numpy as np

from jaxllm.data.packing import segments_of
from jaxllm.data.pipeline import Pipeline
from jaxllm.run.record import count_rows
from jaxllm.run.steps import Steps, steps_or_chunked
from jaxllm.training.sharding import fetch, place_rows
from jaxllm.training.spans import count_spans


def evaluate(steps: Steps, params: Any, pipeline: Pipeline) -> dict[str, float]:
    """Metrics of the first `training.eval_batches` validation batches, which are always the same.

    Returns:
        loss (per token), bits_per_byte (T5: bits_per_target_byte), accuracy, and spans_exact where there are spans.
        With `data.validation` they are those of the first set, and NAME/loss and so on follow for each set.
    """

    def measure(steps: Steps) -> dict[str | None, dict[str, float]]:
        return {name: _measure(steps, params, pipeline, name) for name in pipeline.sets or [None]}

    _, found = steps_or_chunked(steps, measure)
    named = {f"{name}/{key}": value for name, values in found.items() for key, value in values.items() if name}
    return next(iter(found.values())) | named


def _measure(steps: Steps, params: Any, pipeline: Pipeline, name: str | None) -> dict[str, float]:
    config, tokenizer = steps.program.config, pipeline.tokenizer
    sums = np.zeros(3)
    size = exact = spans = 0.0
    for batch in pipeline.validation(config.training.eval_batches, name):
        placed = place_rows(batch, steps.mesh)
        found = jax.device_get(steps.eval_step(params, placed))
        sums += (found.nll, found.weight, found.correct)
        size += float(count_rows(batch, tokenizer.token_bytes)[:, 1].sum(dtype=float))
        if steps.predict is not None:
            predicted = fetch(steps.predict(params, placed))
            whole, total = count_spans(predicted, batch["targets"], segments_of(batch)[1], tokenizer.sentinel_ids)
            exact += whole
            spans += total
    nll, weight, correct = sums.tolist()
    weight = weight or math.nan  # without a counted token the loss is NaN
    return {
        "loss": nll / weight,
        config.model.metric: nll / math.log(2) / (size or math.nan),
        "accuracy": correct / weight,
        **({"spans_exact": exact / spans} if spans else {}),
    }
