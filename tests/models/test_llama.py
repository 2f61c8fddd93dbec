"""Invariants of Llama: causality, packing, one result from both layer loops, and a frozen parameter tree."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import LlamaConfig
from jaxllm.models import Model, build, init_params
from tests.conftest import TOLERANCE

GOLDEN = Path(__file__).parent.parent / "golden" / "llama_tree.json"


def tokens(rows: int, length: int, vocab: int = 97) -> jax.Array:
    return jax.random.randint(jax.random.key(5), (rows, length), 0, vocab)


@functools.partial(jax.jit, static_argnums=0)
def apply(model: Model, params: Any, batch: jax.Array, **inputs: jax.Array) -> jax.Array:
    """Logits, compiled: one operation after the other takes longer to compile."""
    return model.apply({"params": params}, batch, **inputs)


@functools.cache
def gradient_of(config: LlamaConfig) -> Any:
    """A compiled loss and gradient; the test of each layer loop needs the default's."""
    model = build(config)

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        return jnp.mean(jax.nn.log_softmax(apply(model, params, batch))[..., 3])

    return jax.jit(jax.value_and_grad(loss))


def test_parameter_tree_is_frozen(tiny: LlamaConfig) -> None:
    """Checkpoints, sharding rules and interop depend on it: change the golden file on purpose only."""
    full = dataclasses.replace(tiny, qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True)
    found = {}
    for name, config in (
        ("plain", tiny),
        ("tied", dataclasses.replace(tiny, tie_embeddings=True)),
        ("all", full),
    ):
        params = init_params(build(config), jax.random.key(0))
        leaves = jax.tree_util.tree_leaves_with_path(params)
        found[name] = {jax.tree_util.keystr(path): [str(x.dtype), *x.shape] for path, x in leaves}
    assert found == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("remat", ["none", "elementwise", "dots", "full"])
@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_layer_loops_and_remat_change_nothing(tiny: LlamaConfig, layers: str, remat: str) -> None:
    params = init_params(build(tiny), jax.random.key(0))
    changed = dataclasses.replace(tiny, layers=layers, remat=remat)
    want, ours = (gradient_of(config)(params, tokens(2, 12)) for config in (tiny, changed))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE["float32"], rtol=TOLERANCE["float32"])


def test_no_gradient_from_the_future(tiny: LlamaConfig) -> None:
    model = build(tiny)
    params = init_params(model, jax.random.key(0))
    batch = tokens(1, 10)

    def first_logits(table):
        return jnp.sum(apply(model, {**params, "embed": table}, batch)[0, 4] ** 2)

    used = np.abs(np.asarray(jax.grad(first_logits)(params["embed"]))).sum(axis=-1)
    later = set(np.asarray(batch[0, 5:]).tolist()) - set(np.asarray(batch[0, :5]).tolist())
    assert later and all(used[i] == 0 for i in later)
    assert all(used[i] > 0 for i in np.asarray(batch[0, :5]).tolist())


@pytest.mark.parametrize("attention", ["reference", "chunked"])
def test_packed_equals_alone(tiny: LlamaConfig, attention: str) -> None:
    model = build(dataclasses.replace(tiny, attention=attention))
    params = init_params(model, jax.random.key(0))
    a, b = tokens(1, 7), tokens(1, 9) * 2 % 97
    packed = jnp.concatenate([a, b, jnp.zeros((1, 4), a.dtype)], axis=1)
    segments = jnp.array([[1] * 7 + [2] * 9 + [0] * 4])
    positions = jnp.array([[*range(7), *range(9), *[0] * 4]])
    together = apply(model, params, packed, positions=positions, segment_ids=segments)
    np.testing.assert_allclose(together[:, :7], apply(model, params, a), atol=TOLERANCE["float32"])
    np.testing.assert_allclose(together[:, 7:16], apply(model, params, b), atol=TOLERANCE["float32"])
    assert np.all(np.isfinite(np.asarray(together)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(tiny: LlamaConfig, side: str) -> None:
    model = build(tiny)
    params = init_params(model, jax.random.key(0))
    row = tokens(1, 6)
    pad = jnp.zeros((1, 3), row.dtype)
    real, empty = jnp.ones((1, 6), int), jnp.zeros((1, 3), int)
    order = (lambda x, y: [y, x]) if side == "left" else (lambda x, y: [x, y])
    padded, segments = (jnp.concatenate(order(x, y), axis=1) for x, y in ((row, pad), (real, empty)))
    positions = jnp.concatenate(order(jnp.arange(6)[None], jnp.zeros((1, 3), int)), axis=1)
    out = apply(model, params, padded, positions=positions, segment_ids=segments)
    kept = out[:, 3:] if side == "left" else out[:, :6]
    np.testing.assert_allclose(kept, apply(model, params, row), atol=TOLERANCE["float32"])
    assert np.all(np.isfinite(np.asarray(out)))


def test_a_shift_of_all_positions_changes_nothing(tiny: LlamaConfig) -> None:
    model = build(tiny)
    params = init_params(model, jax.random.key(0))
    batch = tokens(2, 11)
    shifted = jnp.arange(11)[None] + 1000
    np.testing.assert_allclose(
        apply(model, params, batch, positions=shifted),
        apply(model, params, batch),
        atol=2e-4,
    )


def test_window_of_the_whole_length_is_no_window(tiny: LlamaConfig) -> None:
    params = init_params(build(tiny), jax.random.key(0))

    def run(window):
        return apply(build(dataclasses.replace(tiny, sliding_window=window)), params, tokens(1, 9))

    np.testing.assert_allclose(run(9), run(None), atol=TOLERANCE["float32"])
    assert np.abs(np.asarray(run(3) - run(None))).max() > 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_close_and_logits_are_float32(tiny: LlamaConfig, dtype: str) -> None:
    params = init_params(build(tiny), jax.random.key(0))
    want = apply(build(tiny), params, tokens(2, 12))
    ours = apply(build(tiny, dtype=jnp.dtype(dtype)), params, tokens(2, 12))
    assert ours.dtype == jnp.float32
    assert np.abs(np.asarray(ours - want)).max() < TOLERANCE[dtype] * np.abs(np.asarray(want)).max() * 2


def test_tied_head_is_the_embedding(tiny: LlamaConfig) -> None:
    tied = dataclasses.replace(tiny, tie_embeddings=True)
    params = init_params(build(tied), jax.random.key(0))
    assert "lm_head" not in params
    untied = {**params, "lm_head": params["embed"]}
    np.testing.assert_array_equal(
        apply(build(tied), params, tokens(1, 5)),
        apply(build(tiny), untied, tokens(1, 5)),
    )
