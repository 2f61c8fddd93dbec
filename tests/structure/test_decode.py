"""The decode step by structure: in place, few operations, lowered for CUDA at real sizes."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxllm.config import LlamaConfig, T5Config
from jaxllm.config.file import load_config
from jaxllm.models import abstract_params, build
from jaxllm.models.cache import init_cache
from jaxllm.models.llama import decode as llama_decode
from jaxllm.models.t5 import decode as t5_decode
from jaxllm.training.fit import tree_bytes
from tests.structure.programs import equations, pretend_gpu

CONFIGS = Path(__file__).parent.parent.parent / "configs"


def traced_decode_step(config: LlamaConfig | T5Config, dtype: Any, *, batch: int, capacity: int) -> tuple[Any, Any]:
    """The decode step with its cache donated, on abstract arguments, and that cache."""
    decode = llama_decode if isinstance(config, LlamaConfig) else t5_decode
    params = abstract_params(build(config, dtype=dtype))
    params = jax.eval_shape(functools.partial(decode.prepare_for_decode, dtype=dtype), params)
    row = jax.ShapeDtypeStruct((batch,), jnp.int32)
    step = functools.partial(decode.decode_step, build(config, dtype=dtype))
    if isinstance(config, LlamaConfig):
        shape = {"num_layers": config.num_layers, "num_kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        cache = jax.eval_shape(lambda: init_cache(batch=batch, capacity=capacity, dtype=dtype, **shape))
        return jax.jit(step, donate_argnums=1).trace(params, cache, row, row), cache
    cross, cache = jax.eval_shape(
        functools.partial(t5_decode.prefill, build(config, dtype=dtype), capacity=capacity),
        params,
        jax.ShapeDtypeStruct((batch, 64), jnp.int32),
        row,
    )
    return jax.jit(step, donate_argnums=2).trace(params, cross, cache, row, row), cache


def operations_of_a_layer(config: LlamaConfig | T5Config) -> collections.Counter[str]:
    """What one more decoder layer adds to the decode step, as counts of primitives."""
    found: list[collections.Counter[str]] = []
    for layers in (2, 3):
        changed = {"num_layers" if isinstance(config, LlamaConfig) else "num_decoder_layers": layers}
        traced, _ = traced_decode_step(dataclasses.replace(config, **changed), jnp.bfloat16, batch=2, capacity=48)
        counts: collections.Counter[str] = collections.Counter()
        for equation, times in equations(traced.jaxpr.jaxpr):
            counts[equation.primitive.name] += times
        del counts["name"]  # lowers to nothing, see jaxllm.study
        found.append(counts)
    return found[1] - found[0]


@pytest.fixture
def tiny_t5() -> T5Config:
    sizes = {"d_model": 32, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 3, "num_heads": 4, "head_dim": 8}
    return T5Config(vocab_size=97, **sizes)


@pytest.mark.parametrize("family", ["tiny", "tiny_t5"])
def test_the_cache_is_updated_in_place(family: str, request: pytest.FixtureRequest) -> None:
    traced, cache = traced_decode_step(request.getfixturevalue(family), jnp.float32, batch=2, capacity=48)
    compiled = traced.lower().compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == tree_bytes(cache)
    stored = ",".join(str(size) for size in cache.keys[0].shape)
    assert not re.findall(rf"f32\[{stored}\]\S* copy\(", compiled.as_text())
    assert memory.temp_size_in_bytes < tree_bytes(cache) / 2


def test_operations_of_a_layer_are_few(tiny: LlamaConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel costs about a microsecond, whatever it does, so their number decides a small model's speed."""
    pretend_gpu(monkeypatch)
    layer = operations_of_a_layer(tiny)
    assert layer["dot_general"] == 4  # qkv, out, gate and up, down
    assert layer["dynamic_update_slice"] == 2  # the new key and value
    assert layer["reduce_sum"] + layer["reduce_max"] <= 8  # two norms, scores, softmax, mix
    assert layer["transpose"] == 2  # of the new key and value only
    assert layer["gather"] == layer["scatter"] == layer["concatenate"] - 2 == 0  # RoPE's halves
    assert sum(layer.values()) <= 125  # 123 with jax 0.11


def test_operations_of_a_t5_layer_are_few(tiny_t5: T5Config, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch)
    layer = operations_of_a_layer(tiny_t5)
    assert layer["dot_general"] == 6  # qkv, out; query and out of the cross-attention; gate and up, down
    assert layer["dynamic_update_slice"] == 2  # the encoder's keys and values are only read
    assert layer["reduce_sum"] + layer["reduce_max"] <= 11  # three norms; scores, softmax and mix, twice
    assert layer["transpose"] == 2  # of the new key and value only
    assert layer["gather"] == layer["scatter"] == layer["concatenate"] == 0  # the bias is made once per step
    assert sum(layer.values()) <= 165  # the activation is widened and rounded, which fuses


@pytest.mark.parametrize("name", ["llama_125m", "llama3_1b", "llama3_8b", "t5_small", "t5_base", "t5_large"])
def test_decode_step_lowers_for_cuda(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch)
    config = load_config(CONFIGS / f"{name}.yaml").model
    traced, cache = traced_decode_step(config, jnp.bfloat16, batch=8, capacity=1024)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    donated = text.count("tf.aliasing_output") + text.count("jax.buffer_donor")
    assert donated == len(jax.tree.leaves(cache))


@pytest.mark.parametrize("name", ["t5_small", "t5_base", "t5_large"])
def test_prefill_lowers_with_fused_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch)
    config = load_config(CONFIGS / f"{name}.yaml").model
    params = abstract_params(build(config, dtype=jnp.bfloat16))
    params = jax.eval_shape(functools.partial(t5_decode.prepare_for_decode, dtype=jnp.bfloat16), params)
    inputs = jax.ShapeDtypeStruct((8, 512), jnp.int32), jax.ShapeDtypeStruct((8,), jnp.int32)
    prefill = jax.jit(functools.partial(t5_decode.prefill, build(config, dtype=jnp.bfloat16), capacity=128))
    text = prefill.trace(params, *inputs).lower(lowering_platforms=("cuda",)).as_text()
    # One kernel a layer, given lengths and a bias that all rows share: no scores of rows exist.
    assert text.count("@__cudnn$fmha") == config.num_layers
    assert f"8x{config.num_heads}x512x512" not in text
