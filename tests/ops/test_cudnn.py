"""The table of cuDNN's calls decides which path runs, and what cuDNN leaves undefined reaches no gradient."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu.attention_calls import SUSPECTS, narrowest
from jaxllm.ops import cudnn
from jaxllm.ops.attention import attention, choose
from jaxllm.ops.cudnn import AVOIDED, Call, avoided, call_of, fused_attention
from jaxllm.ops.masks import Pattern
from tests.conftest import TOLERANCE
from tests.ops.test_attention import operands
from tests.structure.programs import pretend_gpu

LENGTHS = jnp.array([128, 70], jnp.int32)
PATTERN = Pattern(query_lengths=LENGTHS, key_lengths=LENGTHS)


def set_avoided(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (row,) = (row for row in SUSPECTS if row.name == name)
    monkeypatch.setattr(cudnn, "AVOIDED", (*AVOIDED, row))


def biased(length: int = 128) -> tuple[list[jax.Array], jax.Array]:
    arguments = operands(length, length, dtype=jnp.bfloat16, width=64)
    return arguments, jnp.zeros((1, 6, length, length), jnp.bfloat16)


@pytest.mark.parametrize(("generation", "keys", "bad"), [(9, 192, True), (9, 256, False), (10, 192, False)])
def test_a_bias_at_64_keys_beyond_128_is_avoided_on_hopper(generation: int, keys: int, bad: bool) -> None:
    call = Call(generation, "bfloat16", keys, keys, 64, bias=True)
    assert (avoided(call) is not None) == bad
    assert avoided(call._replace(bias=False)) is None


def test_every_call_belongs_to_a_row_and_a_row_is_one_word_away(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch)
    (query, key, _), _ = biased()
    call = call_of(query, key, pattern=Pattern(causal=True), bias=None)
    assert narrowest(call).name == "all calls" and choose("auto", query, key, pattern=Pattern(causal=True)) == "cudnn"
    set_avoided(monkeypatch, "all calls")
    assert choose("auto", query, key, pattern=Pattern(causal=True)) == "chunked"
    with pytest.raises(ValueError, match="not trusted with all calls"):
        choose("cudnn", query, key, pattern=Pattern(causal=True))


def test_a_suspect_with_lengths_takes_blocks_once_it_is_avoided(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch)
    arguments, bias = biased()

    def traced() -> str:
        return str(jax.make_jaxpr(functools.partial(attention, pattern=PATTERN, scale=0.125, bias=bias))(*arguments))

    before = traced()
    set_avoided(monkeypatch, "bias and lengths")
    assert "mask_type=MaskType.PADDING" in before and "bf16[2,128,6,64]" in before
    assert "MaskType" not in traced()


def undefined(scores: jax.Array, query_lengths: Any, key_lengths: Any) -> jax.Array:
    """Where an old cuDNN leaves NaN: rows of padding, and rows that see nothing."""
    nothing = jnp.all(jnp.isneginf(scores), axis=-1, keepdims=True)
    if query_lengths is None or key_lengths is None:
        return nothing
    return nothing | (jnp.arange(scores.shape[2])[:, None] >= query_lengths[:, None, None, None])


def careless(query: Any, key: Any, value: Any, **options: Any) -> jax.Array:
    """cuDNN's attention at its worst: it saves undefined values in a row of padding, and multiplies them by 0 later."""
    query_lengths, key_lengths = options["query_seq_lengths"], options["key_value_seq_lengths"]
    groups = query.shape[2] // key.shape[2]

    def weights(query: Any, key: Any) -> tuple[jax.Array, jax.Array]:
        scores = options["scale"] * jnp.einsum("btnh,bsnh->bnts", query, jnp.repeat(key, groups, axis=2))
        index = jnp.arange(key.shape[1])
        if options["is_causal"]:
            scores = jnp.where(index <= index[:, None], scores, -jnp.inf)
        if key_lengths is not None:
            scores = jnp.where(index < key_lengths[:, None, None, None], scores, -jnp.inf)
        bad = undefined(scores, query_lengths, key_lengths)
        return jnp.where(bad, jnp.nan, jax.nn.softmax(scores, axis=-1)), bad

    @jax.custom_vjp
    def attend(query: Any, key: Any, value: Any) -> jax.Array:
        return jnp.einsum("bnts,bsnh->btnh", weights(query, key)[0], jnp.repeat(value, groups, axis=2))

    def backward(saved: Any, grad: jax.Array) -> Any:
        query, key, value, out = saved
        probabilities = weights(query, key)[0]
        mean = jnp.einsum("btnh,btnh->bnt", grad, out)[..., None]  # 0 * NaN
        slope = jnp.einsum("btnh,bsnh->bnts", grad, jnp.repeat(value, groups, axis=2)) - mean
        scores = options["scale"] * probabilities * slope

        def per_key(x: jax.Array) -> jax.Array:
            return x.reshape(*x.shape[:2], -1, groups, x.shape[-1]).sum(axis=3)

        query_grad = jnp.einsum("bnts,bsnh->btnh", scores, jnp.repeat(key, groups, axis=2))
        key_grad = per_key(jnp.einsum("bnts,btnh->bsnh", scores, query))
        return query_grad, key_grad, per_key(jnp.einsum("bnts,btnh->bsnh", probabilities, grad))

    attend.defvjp(lambda *saved: (attend(*saved), (*saved, attend(*saved))), backward)
    return attend(query, key, value)


EMPTY = jnp.array([128, 0], jnp.int32)
PADDED = {
    "both": PATTERN,
    "causal": Pattern(causal=True, query_lengths=LENGTHS, key_lengths=LENGTHS),
    "a row without tokens": Pattern(query_lengths=EMPTY, key_lengths=EMPTY),
    "keys": Pattern(key_lengths=LENGTHS),
}


@pytest.mark.parametrize("name", PADDED)
def test_what_cudnn_leaves_in_padding_reaches_no_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.nn, "dot_product_attention", careless)
    arguments = operands(128, 128)

    def loss(attend: Any, *args: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(attend(*args, pattern=PADDED[name], scale=0.3)))

    ours = jax.grad(functools.partial(loss, fused_attention), argnums=(0, 1, 2))(*arguments)
    plain = functools.partial(attention, implementation="reference")
    want = jax.grad(functools.partial(loss, plain), argnums=(0, 1, 2))(*arguments)
    for mine, theirs in zip(ours, want, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=TOLERANCE["float32_grad"])


def test_the_careless_kernel_would_poison_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: with the lengths as they are, a padded row's NaN reaches all keys of its row."""
    arguments = operands(128, 128)

    def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        options = {"is_causal": False, "scale": 0.3, "query_seq_lengths": LENGTHS, "key_value_seq_lengths": LENGTHS}
        out = careless(query, key, value, **options)
        return jnp.sum(jnp.where((jnp.arange(128) < LENGTHS[:, None])[..., None, None], out, 0))

    assert np.isnan(np.asarray(jax.grad(loss, argnums=1)(*arguments))).any()


def test_a_row_without_keys_is_finite() -> None:
    arguments = operands(128, 128)
    out = fused_attention(*arguments, pattern=Pattern(key_lengths=EMPTY), scale=0.3, implementation="xla")
    np.testing.assert_allclose(out[1, :, ::2], np.broadcast_to(arguments[2][1, :1], out[1, :, ::2].shape), rtol=1e-5)
