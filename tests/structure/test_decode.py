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

from jaxllm.config import LlamaConfig
from jaxllm.config_file import load_config
from jaxllm.models import abstract_params, build, llama_decode
from jaxllm.models.cache import init_cache
from jaxllm.training.fit import tree_bytes
from tests.structure.programs import equations, pretend_gpu

CONFIGS = Path(__file__).parent.parent.parent / "configs"


def traced_decode_step(config: LlamaConfig, dtype: Any, *, batch: int, capacity: int) -> tuple[Any, Any]:
    """The decode step with its cache donated, on abstract arguments, and that cache."""
    params = abstract_params(build(config, dtype=dtype))
    params = jax.eval_shape(functools.partial(llama_decode.prepare_for_decode, dtype=dtype), params)
    shape = {"num_layers": config.num_layers, "num_kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
    cache = jax.eval_shape(lambda: init_cache(batch=batch, capacity=capacity, dtype=dtype, **shape))
    row = jax.ShapeDtypeStruct((batch,), jnp.int32)
    step = functools.partial(llama_decode.decode_step, config)
    return jax.jit(step, donate_argnums=1).trace(params, cache, row, row), cache


def test_the_cache_is_updated_in_place(tiny: LlamaConfig) -> None:
    traced, cache = traced_decode_step(tiny, jnp.float32, batch=2, capacity=48)
    compiled = traced.lower().compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= tree_bytes(cache)
    stored = ",".join(str(size) for size in cache.keys[0].shape)
    assert not re.findall(rf"f32\[{stored}\]\S* copy\(", compiled.as_text())
    assert memory.temp_size_in_bytes < tree_bytes(cache) / 2


def test_operations_of_a_layer_are_few(tiny: LlamaConfig) -> None:
    """A kernel costs about a microsecond, whatever it does: a small model's speed is their number."""

    def counts(layers: int) -> collections.Counter[str]:
        config = dataclasses.replace(tiny, num_layers=layers)
        traced, _ = traced_decode_step(config, jnp.bfloat16, batch=2, capacity=48)
        found = collections.Counter()
        for equation, times in equations(traced.jaxpr.jaxpr):
            found[equation.primitive.name] += times
        return found

    layer = counts(3) - counts(2)
    assert layer["dot_general"] == 4  # qkv, out, gate and up, down
    assert layer["dynamic_update_slice"] == 2  # the new key and value
    assert layer["reduce_sum"] + layer["reduce_max"] <= 8  # two norms, scores, softmax, mix
    assert layer["transpose"] == 2  # of the new key and value only
    assert layer["gather"] == layer["scatter"] == layer["concatenate"] - 2 == 0  # RoPE's halves
    assert sum(layer.values()) <= 125  # 123 with jax 0.11


@pytest.mark.parametrize("name", ["llama_125m", "llama3_1b", "llama3_8b"])
def test_decode_step_lowers_for_cuda(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch)
    config = load_config(CONFIGS / f"{name}.yaml").model
    traced, cache = traced_decode_step(config, jnp.bfloat16, batch=8, capacity=1024)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    donated = text.count("tf.aliasing_output") + text.count("jax.buffer_donor")
    assert donated == len(jax.tree.leaves(cache))
