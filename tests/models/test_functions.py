"""A model's own attention and positions: one definition for training, scoring and decoding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import LlamaConfig, T5Config, TrainingConfig
from jaxllm.generation import generate, score
from jaxllm.models import build, init_params
from jaxllm.models.functions import Pairs
from jaxllm.ops.attention import masked_attention
from jaxllm.training.loss import build_loss
from tests.conftest import TOLERANCE

SIZES: dict[str, Any] = {"vocab_size": 61, "d_model": 16, "d_ff": 24, "num_layers": 2, "num_heads": 4}
LLAMA = LlamaConfig(**SIZES, num_kv_heads=2, max_length=64)
WINDOW = LlamaConfig(**SIZES, num_kv_heads=2, max_length=64, sliding_window=6)
T5 = T5Config(**SIZES, head_dim=8)
UMT5 = T5Config(**SIZES, head_dim=8, relative_per_layer=True)
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [9, 8, 7]]
SLOPES = jnp.asarray([0.5, 0.25, 0.125, 0.0625])


def distances(queries: jax.Array, keys: jax.Array) -> jax.Array:
    return jnp.abs(queries[:, :, None] - keys[:, None])


def soft_capped_alibi(query: jax.Array, key: jax.Array, value: jax.Array, pairs: Pairs) -> jax.Array:
    """Scores between -3 and 3, less a slope times the distance."""
    key, value = (jnp.repeat(each, query.shape[2] // each.shape[2], axis=2) for each in (key, value))
    scores = 3 * jnp.tanh(jnp.einsum("btnh,bsnh->bnts", query, key) / 3)
    scores -= SLOPES[:, None, None] * distances(pairs.query_positions, pairs.key_positions)[:, None]
    if pairs.bias is not None:
        scores += pairs.bias
    weights = jax.nn.softmax(jnp.where(pairs.mask[:, None], scores, -1e9))
    return jnp.einsum("bnts,bsnh->btnh", weights if pairs.drop is None else pairs.drop(weights), value)


def as_ever(query: jax.Array, key: jax.Array, value: jax.Array, pairs: Pairs) -> jax.Array:
    """What a model does by itself, written as an own attention."""
    scale = 1.0 if pairs.bias is not None else query.shape[-1] ** -0.5
    return masked_attention(query, key, value, mask=pairs.mask, scale=scale, bias=pairs.bias)


def shifted(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Absolute positions, as a wave that is added to queries and keys."""
    return x + jnp.sin(positions[..., None, None] * jnp.arange(1, x.shape[-1] + 1) / 7).astype(x.dtype)


def linear_bias(table: jax.Array, queries: jax.Array, keys: jax.Array, *, bidirectional: bool) -> jax.Array:
    """A slope per head from the table, steeper in the encoder."""
    slope = (2 if bidirectional else 1) * table[0]
    return -slope[None, :, None, None] * distances(queries, keys)[:, None]


OWN: dict[str, Any] = {
    "llama attention": (LLAMA, {"attend": soft_capped_alibi}),
    "llama positions": (LLAMA, {"rotate": shifted}),
    "llama both": (LLAMA, {"attend": soft_capped_alibi, "rotate": shifted}),
    "llama window": (WINDOW, {"attend": soft_capped_alibi, "rotate": shifted}),
    "t5 attention": (T5, {"attend": soft_capped_alibi}),
    "t5 bias": (T5, {"position_bias": linear_bias}),
    "umt5 both": (UMT5, {"attend": soft_capped_alibi, "position_bias": linear_bias}),
}


def logits_of(model: Any, params: Any, prompt: list[int], new: list[int]) -> jax.Array:
    """Logits that predict each new token, by the model itself."""
    if model.config.family == "t5":
        shifted_right = [model.config.decoder_start_id, *new[:-1]]
        return model.apply({"params": params}, jnp.array([prompt]), jnp.array([shifted_right]))[0]
    return model.apply({"params": params}, jnp.array([prompt + new[:-1]]))[0, len(prompt) - 1 :]


def made(name: str) -> tuple[Any, Any, Any]:
    config, own = OWN[name]
    plain = build(config)
    params = jax.tree.map(lambda x: x * 4 if x.ndim == 3 else x, init_params(plain, jax.random.key(0)))
    return plain.clone(**own), plain, params


@pytest.mark.parametrize("name", OWN)
def test_cached_decoding_and_scores_are_those_of_the_whole_forward(name: str) -> None:
    model, plain, params = made(name)
    written = generate(model, params, PROMPTS, max_new_tokens=8)
    scores = score(model, params, PROMPTS, written)
    for prompt, new, found in zip(PROMPTS, written, scores, strict=True):
        logits = logits_of(model, params, prompt, new)
        assert logits.argmax(-1).tolist() == new
        want = jax.nn.log_softmax(logits)[np.arange(len(new)), np.array(new)]
        np.testing.assert_allclose(found, want, atol=TOLERANCE["float32"])
        assert jnp.abs(logits - logits_of(plain, params, prompt, new)).max() > 0.01


@pytest.mark.parametrize("name", ["llama both", "umt5 both"])
def test_the_loss_is_trained_with_them(name: str) -> None:
    model, plain, params = made(name)
    tokens = jnp.asarray([PROMPTS[0]])
    names = ("encoder_tokens", "decoder_tokens") if model.config.family == "t5" else ("tokens",)
    batch = dict.fromkeys((*names, "targets"), tokens) | {"weights": jnp.ones(tokens.shape)}

    def step(of: Any) -> Any:
        loss = build_loss(of, TrainingConfig(loss_chunk=8))
        return jax.jit(jax.value_and_grad(lambda p: loss(p, batch, None).loss))(params)

    own, theirs = step(model), step(plain)
    logits = model.apply({"params": params}, *[tokens] * len(names))
    want = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1).sum()
    np.testing.assert_allclose(own[0], want, rtol=1e-5)
    assert abs(float(own[0] - theirs[0])) > 1e-3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(own[1]))


@pytest.mark.parametrize("config", [LLAMA, WINDOW], ids=["causal", "window"])
def test_an_own_attention_that_does_the_same_changes_nothing(config: LlamaConfig) -> None:
    plain = build(config)
    params = init_params(plain, jax.random.key(0))
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0]])
    own = plain.clone(attend=as_ever)
    for options in ({}, {"segment_ids": segments, "positions": jnp.array([[0, 1, 2, 0, 1, 2, 3, 4]])}):
        want = plain.apply({"params": params}, jnp.arange(8)[None], **options)
        found = own.apply({"params": params}, jnp.arange(8)[None], **options)
        np.testing.assert_allclose(found[:, :7], want[:, :7], atol=TOLERANCE["float32"])
    assert generate(own, params, PROMPTS, max_new_tokens=8) == generate(plain, params, PROMPTS, max_new_tokens=8)


def test_models_are_equal_when_their_functions_are() -> None:
    plain = build(LLAMA)
    assert plain.clone(attend=as_ever) == build(LLAMA).clone(attend=as_ever) != plain
    assert hash(plain.clone(attend=as_ever)) == hash(build(LLAMA).clone(attend=as_ever))
