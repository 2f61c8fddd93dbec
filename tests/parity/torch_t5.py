"""transformers' side of the T5 parity cases; importing it needs torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from tests.parity import t5_cases as cases

torch.set_num_threads(1)  # these models are too small to share


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a case with its hashed weights, the head its own where it should be, and plain attention."""
    kind, different = cases.CASES[name]
    config = AutoConfig.for_model(kind, **cases.settings(name))
    model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        if different.get("tie_word_embeddings") is False:  # transformers 5 ties every new model, whatever it is told
            model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
        for key, parameter in model.named_parameters():
            parameter.copy_(torch.tensor(cases.weight(key, tuple(parameter.shape))))
    return model.to(dtype)


def numbers(model: Any) -> cases.Numbers:
    """Logits, loss and every gradient."""
    out = model(**_batch(model), labels=_long(cases.labels(model.config.vocab_size)))
    out.loss.backward()
    grads = {key: parameter.grad.numpy() for key, parameter in model.named_parameters()}
    return cases.Numbers(out.logits.detach().numpy(), out.loss.item(), grads)


def logits(model: Any) -> np.ndarray:
    """Logits in float64, which holds every dtype's exactly."""
    shifted = cases.decoder_tokens(model.config.decoder_start_token_id, model.config.vocab_size)
    with torch.no_grad():
        return model(**_batch(model), decoder_input_ids=_long(shifted)).logits.double().numpy()


def inside(model: Any) -> dict[str, np.ndarray]:
    """Inputs and attention maps of all layers, by the paths of `jaxllm.study`; the last state, normalised."""
    shifted = cases.decoder_tokens(model.config.decoder_start_token_id, model.config.vocab_size)
    with torch.no_grad():
        batch = {**_batch(model), "decoder_input_ids": _long(shifted)}
        out = model(**batch, output_hidden_states=True, output_attentions=True)
    return {
        "last": out.decoder_hidden_states[-1].numpy(),
        "encoder/layers/input": np.stack(out.encoder_hidden_states[:-1]),
        "decoder/layers/input": np.stack(out.decoder_hidden_states[:-1]),
        "encoder/layers/attention/attention_weights": np.stack(out.encoder_attentions),
        "decoder/layers/attention/attention_weights": np.stack(out.decoder_attentions),
        "decoder/layers/cross_attention/attention_weights": np.stack(out.cross_attentions),
    }


def greedy(model: Any) -> list[list[int]]:
    """What `generate` puts after the start id; its cache fails when the decoder is deeper than the encoder."""
    out = model.generate(
        **_batch(model),
        max_new_tokens=cases.NEW,
        do_sample=False,
        use_cache=model.config.num_decoder_layers <= model.config.num_layers,
    )
    return out[:, 1:].tolist()


def _batch(model: Any) -> dict[str, Any]:
    mask = _long(cases.source_mask())
    return {"input_ids": _long(cases.source(model.config.vocab_size)), "attention_mask": mask}


def _long(array: np.ndarray) -> Any:
    return torch.tensor(array).long()
