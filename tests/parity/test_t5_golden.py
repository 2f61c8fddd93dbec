"""Every T5-shaped variant against transformers' recorded results; needs no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxllm
from jaxllm.models import build
from jaxllm.models.t5 import model as t5_module
from tests.parity import t5_cases as cases


@pytest.mark.parametrize("name", cases.CASES)
def test_logits_loss_and_every_gradient(name: str, t5_numbers: Callable[[str], cases.Numbers]) -> None:
    ours, golden = t5_numbers(name), cases.load_golden(name)
    assert cases.logit_error(ours.logits, golden["logits"]) < cases.LOGITS
    assert ours.loss == pytest.approx(float(golden["loss"]), rel=1e-5)
    assert sorted(ours.grads) == sorted(golden["shapes"])
    for key, want in zip(sorted(golden["shapes"]), golden["grads"], strict=True):
        found = cases.grad_summary(key, ours.grads[key])
        assert want[1] > 0, key
        np.testing.assert_allclose(found[0], want[0], rtol=cases.GRADS, err_msg=key)
        np.testing.assert_allclose(found[1:], want[1:], atol=cases.GRADS * want[1], rtol=0, err_msg=key)


@pytest.mark.parametrize("name", cases.CASES)
def test_greedy_tokens(name: str, t5_directory: Callable[[str], Path]) -> None:
    assert cases.our_greedy(t5_directory(name)) == cases.load_golden(name)["greedy"].tolist()


def _both_ways(bias: Any) -> Any:
    return lambda *args, **kwargs: bias(*args, **{**kwargs, "bidirectional": True})


# What a port of T5 typically gets wrong, and a case that must show it.
FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "erf for tanh in gated-gelu": ("v1_1", {"activation": "gelu"}),
    "logits not scaled": ("v1_0", {"scale_logits": False}),
    "logits of an own head scaled": ("mt5", {"scale_logits": True}),
    "epsilon of another model": ("v1_0_eps_start", {"norm_eps": 1e-6}),
    "one table for all layers": ("umt5", {}),
    "bidirectional buckets in the decoder": ("deep_decoder", {}),
    "padding of the source seen": ("v1_1", {}),
    "start id of another model": ("v1_0_eps_start", {"decoder_start_id": 0}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault: str, t5_directory: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    name, change = FAULTS[fault]
    model, params = jaxllm.load_hf(t5_directory(name))
    if "buckets" in fault:
        monkeypatch.setattr(t5_module, "relative_bias", _both_ways(t5_module.relative_bias))
    if "padding" in fault:
        monkeypatch.setattr(cases, "source_mask", lambda: np.ones_like(cases.source()))
    if "table" in fault:
        for stack in ("encoder", "decoder"):
            table = params[stack]["layers"]["relative_bias"]
            params[stack]["layers"]["relative_bias"] = 0 * table + table[:1]
    wrong = build(dataclasses.replace(model.config, **change))
    error = cases.logit_error(cases.our_logits(wrong, params), cases.load_golden(name)["logits"])
    print(f"{fault}: {error:.1e}")
    assert error > 1.5 * cases.LOGITS
