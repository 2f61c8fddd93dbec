"""transformers' side of the parity cases; importing it needs torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.parity import llama_cases as cases

torch.set_num_threads(1)  # these models are too small to share


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a case with its hashed weights, and the plain attention of the definition."""
    config = AutoConfig.for_model(cases.CASES[name][0], **cases.settings(name))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(torch.tensor(cases.weight(key, tuple(parameter.shape))))
    return model.to(dtype)


def numbers(model: Any) -> cases.Numbers:
    """Logits, loss and every gradient."""
    ids = torch.tensor(cases.tokens()).long()
    out = model(ids, labels=ids)
    out.loss.backward()
    grads = {key: parameter.grad.numpy() for key, parameter in model.named_parameters()}
    return cases.Numbers(out.logits.detach().numpy(), out.loss.item(), grads)


def logits(model: Any, ids: np.ndarray, **inputs: np.ndarray) -> np.ndarray:
    """Logits in float64, which holds every dtype's exactly."""
    given = {key: torch.tensor(np.asarray(value)).long() for key, value in inputs.items()}
    with torch.no_grad():
        return model(torch.tensor(ids).long(), **given).logits.double().numpy()


def inside(model: Any, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Hidden states and attention maps of all layers, by the names of `jaxllm.study`; the last state is normalised."""
    with torch.no_grad():
        out = model(torch.tensor(ids).long(), output_hidden_states=True, output_attentions=True)
    *inputs, last = out.hidden_states
    return {"input": np.stack(inputs), "last": last.numpy(), "attention_weights": np.stack(out.attentions)}


def greedy(model: Any) -> list[list[int]]:
    """What `generate` adds to the first tokens of each row."""
    prompt = torch.tensor(cases.tokens()[:, : cases.PROMPT]).long()
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=cases.NEW, do_sample=False, pad_token_id=0
    )
    return out[:, cases.PROMPT :].tolist()
