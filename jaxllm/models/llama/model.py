"""Llama (arXiv 2302.13971) and its relatives: a pre-norm decoder with rotary positions and grouped-query attention.

For training and scoring, whole sequences and no cache at all; decoding is `jaxllm.models.llama.decode`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.config import LlamaConfig
from jaxllm.models.flops import Flops
from jaxllm.models.layers import (
    ACTIVATIONS,
    DEFAULT_ISLANDS,
    MASTER,
    Islands,
    Linear,
    Params,
    RMSNorm,
    apply,
    apply_stack,
    check_depth,
    check_shape,
    check_tokens,
    embed,
    init_stack,
    refuse,
    site,
)
from jaxllm.ops.attention import attention
from jaxllm.ops.masks import Pattern
from jaxllm.ops.rope import apply_rope, rope_cos_sin, rope_frequencies

Rope = tuple[Float[Array, "#B T P"], Float[Array, "#B T P"]]  # cos and sin of each pair's angle


class LlamaLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Attributes:
        config: architecture.
        dtype: of the sublayers; the residual stream x keeps its own.
        islands: dtypes of what does not follow it.
    """

    config: LlamaConfig
    dtype: Any
    islands: Islands = DEFAULT_ISLANDS

    def setup(self) -> None:
        """Creates the projections and norms, named as in design.md."""
        c, norms = self.config, self.islands.norms
        queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        residual_std = c.init_std / (2 * c.num_layers) ** 0.5  # GPT-2: keeps the stream's variance at init
        self.attn_norm = RMSNorm(c.d_model, c.norm_eps, norms)
        self.q_proj = Linear(c.d_model, queries, c.init_std, c.qkv_bias)
        self.k_proj = Linear(c.d_model, keys, c.init_std, c.qkv_bias)
        self.v_proj = Linear(c.d_model, keys, c.init_std, c.qkv_bias)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.norm_eps, norms)
            self.k_norm = RMSNorm(c.head_dim, c.norm_eps, norms)
        else:
            refuse(self, "q_norm", "k_norm")
        self.o_proj = Linear(queries, c.d_model, residual_std, c.out_bias)
        self.mlp_norm = RMSNorm(c.d_model, c.norm_eps, norms)
        self.gate_proj = Linear(c.d_model, c.d_ff, c.init_std, c.mlp_bias)
        self.up_proj = Linear(c.d_model, c.d_ff, c.init_std, c.mlp_bias)
        self.down_proj = Linear(c.d_ff, c.d_model, residual_std, c.mlp_bias)

    def __call__(self, x: Float[Array, "B T D"], rope: Rope, pattern: Pattern) -> Float[Array, "B T D"]:
        """One layer over whole sequences."""
        c = self.config
        x = site(x, "input")
        query, key, value = self._project(self.attn_norm(x).astype(self.dtype), rope)
        mixed = attention(
            query,
            key,
            value,
            pattern=pattern,
            scale=c.head_dim**-0.5,
            implementation=c.attention,
            softmax_dtype=self.islands.softmax,
        )
        return self._finish(x, site(mixed, "heads"))

    def _project(self, x: Array, rope: Rope) -> tuple[Array, Array, Array]:
        c = self.config
        heads = (*x.shape[:2], -1, c.head_dim)
        query, key, value = (proj(x).reshape(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if c.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = apply_rope(query, *rope), apply_rope(key, *rope)
        return site(query, "query"), site(key, "key"), site(value, "value")

    def _finish(self, x: Array, mixed: Array) -> Array:
        update = site(self.o_proj(mixed.reshape(*x.shape[:2], -1)), "attention_output")
        x = site(x + update.astype(x.dtype), "after_attention")
        h = self.mlp_norm(x).astype(self.dtype)
        gate, up = site(self.gate_proj(h), "gate"), site(self.up_proj(h), "up")
        neurons = site(ACTIVATIONS[self.config.activation](gate) * up, "neurons")
        update = site(self.down_proj(neurons), "mlp_output")
        return site(x + update.astype(x.dtype), "after_mlp")


class Llama(nn.Module):
    """The decoder; `dtype` is the compute dtype, parameters are created in float32.

    Attributes:
        config: architecture.
        dtype: of activations and matmul inputs; logits are float32.
        islands: dtypes of what does not follow `dtype`.
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    islands: Islands = DEFAULT_ISLANDS

    def setup(self) -> None:
        """Creates the embedding, the stacked layers, the last norm and the head."""
        c = self.config
        normal = nn.initializers.normal(c.init_std)
        self.embed = self.param("embed", normal, (c.vocab_size, c.d_model), MASTER)
        # Not by self.param alone: it would trace the initialiser again.
        if not self.has_variable("params", "layers"):
            self.param("layers", init_stack, self._init_layer, c.num_layers)
        check_depth(self._layers(), c.num_layers)
        self.final_norm = RMSNorm(c.d_model, c.norm_eps, self.islands.norms)
        if c.tie_embeddings:
            refuse(self, "lm_head")
        else:
            self.lm_head = self.param("lm_head", normal, (c.vocab_size, c.d_model), MASTER)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "#B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        length: int | None = None,
    ) -> Float[Array, "B T V"]:
        """Float32 logits of the token after each position.

        Args:
            tokens: ids.
            positions: of each token in its document; None counts from 0.
            segment_ids: document of each token, 0 = padding (its output means nothing); None is one document.
            length: context length that dynamic and longrope scaling assume; None is T.

        Raises:
            ValueError: while tracing, for tokens that are no integers [B, T], or parameters of another model.
        """
        x = self.hidden(tokens, positions=positions, segment_ids=segment_ids, length=length)
        return self.logits(x)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "#B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        length: int | None = None,
    ) -> Float[Array, "B T D"]:
        """The normalised last hidden state, for losses that never build all logits; arguments as `__call__`."""
        c = self.config
        check_tokens(tokens, "tokens")
        check_shape(positions, "positions", tokens.shape, (1, tokens.shape[1]))
        check_shape(segment_ids, "segment_ids", tokens.shape)
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None]
        rope = self._rope(positions, length or tokens.shape[1])
        pattern = self._pattern(segment_ids)
        layer = LlamaLayer(c, self.dtype, self.islands, parent=None)
        x = apply_stack(
            lambda params, h, _: apply(layer, params, h, rope, pattern),
            self._layers(),
            embed(self.embed, tokens, dtype=self.dtype).astype(self.islands.residual or self.dtype),
            mode=c.layers,
            remat=c.remat,
        )
        return self.final_norm(x).astype(self.dtype)

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """X @ head.T, accumulated and returned in float32."""
        return jnp.einsum("btd,vd->btv", x, self.head(), preferred_element_type=jnp.float32)

    def lens(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits of a stream at any layer, as `jaxllm.study` captures it: last norm, then head (the logit lens)."""
        return self.logits(self.final_norm(x).astype(self.dtype))

    def head(self) -> Float[Array, "V D"]:
        """The output head in the compute dtype: its own, or the embedding when tied."""
        return jnp.asarray(self.embed if self.config.tie_embeddings else self.lm_head, self.dtype)

    def _layers(self) -> Any:
        return self.get_variable("params", "layers")

    def _rope(self, positions: Array, length: int) -> Rope:
        c = self.config
        frequencies, scaling = rope_frequencies(c.rope, head_dim=c.head_dim, max_length=c.max_length, length=length)
        return rope_cos_sin(positions, frequencies, scaling)

    def _pattern(self, segment_ids: Array | None) -> Pattern:
        return Pattern(
            causal=True,
            window=self.config.sliding_window,
            query_segments=segment_ids,
            key_segments=segment_ids,
        )

    def _init_layer(self, key: Array) -> Params:
        c = self.config
        pair = jnp.zeros((1, 1, c.head_dim // 2))
        x = jnp.zeros((1, 1, c.d_model))
        variables: Any = LlamaLayer(c, self.dtype, parent=None).init(key, x, (pair, pair), Pattern(causal=True))
        return variables["params"]


def hidden(model: Llama, params: Any, batch: Mapping[str, Any], key: Array | None = None) -> Float[Array, "B T D"]:
    """Hidden states of a training batch, `tokens` [B, T] with `positions` and `segment_ids` where wanted."""
    del key  # there is no dropout
    inputs = {name: batch[name] for name in ("positions", "segment_ids") if name in batch}
    return apply(model, params, batch["tokens"], **inputs, method="hidden")


def train_flops(c: LlamaConfig, batch: int, length: int, target_length: int) -> Flops:
    """Work of a train step on rows of `length` tokens; a decoder has no `target_length`."""
    del target_length
    tokens, queries, keys = batch * length, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    per_layer = 2 * c.d_model * queries + 2 * c.d_model * keys + 3 * c.d_model * c.d_ff
    weights = 6.0 * (c.num_layers * per_layer + c.vocab_size * c.d_model) * tokens
    attention = 6.0 * c.num_layers * queries * length * tokens
    return Flops(weights + attention, weights + 2 * attention, weights)
