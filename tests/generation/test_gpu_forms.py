"""What decoding does differently on a GPU gives what it gives on a CPU: one store per layer, norms of one row."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import LlamaConfig, T5Config
from jaxllm.generation import BeamSettings, beam_search, generate
from jaxllm.models import build, init_params
from jaxllm.models import cache as kv
from jaxllm.ops import backend
from jaxllm.ops.pointwise import rms_norm
from jaxllm.ops.sampling import Sampling
from tests.generation.uncached import generate_checked

WIDTHS = {"vocab_size": 97, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4}
CONFIGS = {
    "llama": LlamaConfig(num_kv_heads=2, max_length=128, qk_norm=True, tie_embeddings=True, **WIDTHS),
    "window": LlamaConfig(num_kv_heads=2, max_length=128, sliding_window=4, **WIDTHS),
    "t5": T5Config(head_dim=8, **WIDTHS),
}
PROMPT = [[8, 9, 10, 11, 12, 8, 9]]


@pytest.fixture
def as_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Inside `enter()`, what is traced is traced for a GPU; programs of either side are not found by the other."""
    yield monkeypatch
    jax.clear_caches()


def enter(monkeypatch: pytest.MonkeyPatch) -> None:
    jax.clear_caches()
    monkeypatch.setattr(backend, "on_gpu", lambda: True)
    monkeypatch.setattr(backend, "on_cpu", lambda: False)


def answers(model, params) -> list:
    options = {"max_new_tokens": 8, "eos_ids": (1,)}
    warm = {"sampling": Sampling(temperature=1.0), "seed": [4], "samples": 3}
    beams = beam_search(model, params, PROMPT, search=BeamSettings(beams=3, returned=2), **options)
    return [
        generate_checked(model, params, PROMPT, **options),
        generate(model, params, PROMPT, **warm, **options),
        generate(model, params, PROMPT, cache_dtype="int8", **options),
        [beam.tokens for beam in beams[0]],
    ]


@pytest.mark.parametrize("name", list(CONFIGS))
def test_one_row_decodes_as_on_a_cpu(name: str, as_gpu: pytest.MonkeyPatch) -> None:
    model = build(CONFIGS[name])
    rng = np.random.default_rng(1)
    params = init_params(model, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.2 * rng.standard_normal(x.shape, np.float32), params)
    want = answers(model, params)
    enter(as_gpu)
    assert kv.init_cache(batch=1, capacity=8, num_layers=1, num_kv_heads=2, head_dim=4, dtype=jnp.int8).values == (
        None,
    )
    assert answers(model, params) == want


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_norm_of_one_row_is_the_same_to_the_last_bit(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = jax.random.normal(jax.random.key(0), (1, 1, 48)).astype(dtype)
    weight = jax.random.normal(jax.random.key(1), (48,)).astype(dtype)
    want = rms_norm(x, weight, eps=1e-5)
    monkeypatch.setattr(backend, "on_gpu", lambda: True)
    got = rms_norm(x, weight, eps=1e-5)
    assert got.shape == want.shape and got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)
