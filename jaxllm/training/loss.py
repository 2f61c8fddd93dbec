"""What a family minimises on a batch: hidden states through the chunked vocabulary loss.

A loss function maps (compute parameters, batch, key) to `LossSums`; the train step knows nothing else of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxllm.config import TrainingConfig
from jaxllm.models import Model
from jaxllm.models.layers import apply
from jaxllm.ops.losses import LossSums, chunked_cross_entropy

Batch = Mapping[str, Any]  # arrays, of NumPy or of jax
LossFunction = Callable[[Any, Batch, jax.Array], LossSums]


def build_loss(model: Model, config: TrainingConfig) -> LossFunction:
    """The training loss of a model, per `config.z_loss` and `config.loss_chunk`."""

    def llama_loss(params: Any, batch: Batch, key: jax.Array) -> LossSums:
        hidden = apply(
            model,
            params,
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            method="hidden",
        )
        head = apply(model, params, method="head")
        return chunked_cross_entropy(
            hidden, head, batch["targets"], batch["weights"], z_loss=config.z_loss, chunk=config.loss_chunk
        )

    return llama_loss
