"""Every Llama-shaped variant against transformers' recorded results; needs no torch."""

from __future__ import annotations

import numpy as np
import pytest

import jaxllm
from tests.parity import llama_cases as cases


@pytest.mark.parametrize("name", cases.CASES)
def test_logits_loss_and_gradients(name: str, llama_numbers) -> None:
    ours, golden = llama_numbers(name), cases.load_golden(name)
    assert cases.logit_error(ours.logits, golden["logits"]) < cases.LOGITS
    assert ours.loss == pytest.approx(float(golden["loss"]), rel=1e-5)
    assert sorted(ours.grads) == sorted(golden["shapes"])
    for key, want in zip(sorted(golden["shapes"]), golden["grads"], strict=True):
        found = cases.grad_summary(key, ours.grads[key])
        assert want[1] > 0, key
        np.testing.assert_allclose(found[0], want[0], rtol=cases.GRADS, err_msg=key)
        np.testing.assert_allclose(found[1:], want[1:], atol=cases.GRADS * want[1], rtol=0, err_msg=key)


@pytest.mark.parametrize("name", cases.CASES)
def test_greedy_tokens(name: str, llama_directory) -> None:
    model, params = jaxllm.load_hf(llama_directory(name))
    prompts = cases.tokens()[:, : cases.PROMPT].tolist()
    ours = jaxllm.generate(model, params, prompts, max_new_tokens=cases.NEW)
    assert ours == cases.load_golden(name)["greedy"].tolist()
