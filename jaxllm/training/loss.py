"""What a family minimises on a batch: hidden states through the chunked vocabulary loss.

A loss function maps (compute parameters, batch, key) to `LossSums`; the train step knows nothing else of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxllm.config import TrainingConfig
from jaxllm.models import Model, family_of
from jaxllm.models.layers import apply
from jaxllm.ops.losses import LossSums, chunked_cross_entropy

Batch = Mapping[str, Any]  # arrays, of NumPy or of jax
LossFunction = Callable[[Any, Batch, jax.Array | None], LossSums]


def build_loss(model: Model, config: TrainingConfig) -> LossFunction:
    """The training loss of a model, per `config.z_loss` and `config.loss_chunk`; key None is no dropout.

    Batches hold `targets` and `weights` [B, T], and `tokens` [B, T] with `positions` and `segment_ids` where wanted (a
    decoder), or `encoder_tokens` [B, S] and `decoder_tokens` [B, T] with `encoder_segment_ids` and
    `decoder_segment_ids`, or `encoder_lengths` [B], where wanted (an encoder-decoder). Divide the sums once:
    `sums.loss / sums.weight`.
    """
    hidden = family_of(model).hidden

    def loss(params: Any, batch: Batch, key: jax.Array | None) -> LossSums:
        states, head = hidden(model, params, batch, key), apply(model, params, method="head")
        with jax.named_scope("logits"):  # the precision ledger reads it
            return chunked_cross_entropy(
                states,
                head,
                batch["targets"],
                batch["weights"],
                z_loss=config.z_loss,
                chunk=config.loss_chunk,
                logits_dtype=model.islands.logits,
            )

    return loss
