"""The check of decoded tokens passes for decoding as it is, and catches a cache that is written wrongly."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu import decode, plan
from benchmarks.gpu.decode_check import Agreement, first_chunk
from benchmarks.shapes import shape
from jaxllm.generation.requests import Request, make_request
from jaxllm.models import build, cache
from tests.gpu.test_benchmark import result


def request(name: str, dtype: Any, **sizes: int) -> Request:
    model = build(shape(name, toy=True, **{"max_length": 64} if name == "1b" else {}), dtype=dtype)
    params = decode.fill(decode.abstract_weights(model, int8=False))
    prompts = np.random.default_rng(0).integers(1, model.config.vocab_size, (2, 40)).tolist()
    return make_request(model, params, prompts, max_new_tokens=16)


# XLA:CPU has no bfloat16 matmul of the shapes in a toy T5's decoding.
@pytest.mark.parametrize(("name", "dtype"), [("1b", "float32"), ("1b", "bfloat16"), ("t5_large", "float32")])
def test_decoding_agrees_with_a_forward_pass(name: str, dtype: str) -> None:
    found = first_chunk(request(name, jnp.dtype(dtype)))
    assert found.good and found.gap < found.allowed / 2 and found.error < found.allowed / 2, found


WRITE = cache.write


def lost(store: Any, new: jax.Array, slot: jax.Array) -> Any:
    return store if new.shape[1] == 1 else WRITE(store, new, slot)


def next_slot(store: Any, new: jax.Array, slot: jax.Array) -> Any:
    return WRITE(store, new, slot + 1 if new.shape[1] == 1 else slot)


def first_slot(store: Any, new: jax.Array, slot: jax.Array) -> Any:
    return WRITE(store, new, slot * 0 if new.shape[1] == 1 else slot)


@pytest.mark.parametrize("fault", [lost, next_slot, first_slot])
@pytest.mark.parametrize(("name", "dtype"), [("1b", "bfloat16"), ("t5_large", "float32")])
def test_a_wrong_write_is_caught(name: str, dtype: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(name, jnp.dtype(dtype))
    monkeypatch.setattr(cache, "write", fault)
    jax.clear_caches()
    found = first_chunk(asked)
    jax.clear_caches()
    assert not found.good, found


def test_the_first_call_checks_its_decoding() -> None:
    names = [case.name.split("/")[1] for case in plan.FIRST if case.name.startswith("decode/")]
    assert names and all(decode._checked(decode.case_of(name)) for name in names)
    assert not any(decode._checked(decode.case_of(name)) for name in ("8b_b64", "8b_b1_8k", "t5_large_b1"))


def test_a_case_that_disagrees_says_so_and_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode.main("1b_b1", toy=True)
    assert result(capsys)["logits_error"] < 1e-3
    monkeypatch.setattr(decode, "first_chunk", lambda _: Agreement(0.5, 0.0, 0.15))
    with pytest.raises(SystemExit, match="not those of a forward pass"):
        decode.main("1b_b1", toy=True)
    assert result(capsys)["tokens_agree"] is False
