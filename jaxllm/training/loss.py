"""The loss of a family on a batch: hidden states through the chunked vocabulary loss.

A loss function maps (compute parameters, batch, key) to `LossSums`; nothing else of a model reaches the train step.
"""

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
    """The training loss of a model, per `config.z_loss` and `config.loss_chunk`; key None turns dropout off.

    >>> import jaxllm
    >>> config = jaxllm.LlamaConfig(vocab_size=16, d_model=8, d_ff=16, num_layers=1, num_heads=2)
    >>> model = jaxllm.build(config)
    >>> params = jaxllm.init_params(model, jax.random.key(0))
    >>> tokens = jax.numpy.arange(12).reshape(2, 6)
    >>> batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": jax.numpy.ones((2, 5))}
    >>> sums = build_loss(model, TrainingConfig())(params, batch, None)
    >>> print(f"{sums.loss / sums.weight:.1f} nats per token")
    2.8 nats per token

    Batches hold `targets` and `weights` [B, T]. A decoder also takes `tokens` [B, T], and optionally `positions` and
    `segment_ids`. An encoder-decoder also takes `encoder_tokens` [B, S] and `decoder_tokens` [B, T], and optionally
    `encoder_segment_ids` and `decoder_segment_ids`, or `encoder_lengths` [B]. A call raises ValueError for arrays of
    another shape. Divide the sums once, after all microbatches and devices.
    """
    hidden = family_of(model).hidden
    options: Any = {"z_loss": config.z_loss, "chunk": config.loss_chunk, "logits_dtype": model.islands.logits}

    def loss(params: Any, batch: Batch, key: jax.Array | None) -> LossSums:
        states, head = hidden(model, params, batch, key), apply(model, params, method="head")
        with jax.named_scope("logits"):  # the precision ledger reads it
            return chunked_cross_entropy(states, head, batch["targets"], batch["weights"], **options)

    return loss
