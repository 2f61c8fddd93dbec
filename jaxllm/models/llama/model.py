"""Llama (arXiv 2302.13971) and its relatives: a pre-norm decoder with rotary positions and grouped-query attention.

`layer_body` is one layer for training, scoring, prefill and decoding. What differs comes as arguments: the maps of the
layer's parameters in either layout (`LayerMaps`), and the two functions that research code may replace, attention and
positions. The modules are for training and scoring, whole sequences and no cache at all; decoding is
`jaxllm.models.llama.decode`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.config import LlamaConfig
from jaxllm.models.functions import Attend, Pairs, Rotate, dense_mask
from jaxllm.models.layers import (
    DEFAULT_ISLANDS,
    MASTER,
    Islands,
    LayerMaps,
    Linear,
    Map,
    RMSNorm,
    add,
    apply,
    embed,
    mark,
)
from jaxllm.models.model import FamilyModule, Flops, check_shape, check_tokens, refuse
from jaxllm.models.stack import apply_stack, create_stack
from jaxllm.ops.attention import attention
from jaxllm.ops.masks import Pattern
from jaxllm.ops.pointwise import ACTIVATIONS
from jaxllm.ops.positions import apply_rope, rope_cos_sin, rope_frequencies


def layer_body(
    maps: LayerMaps, x: Float[Array, "B T D"], attend: Callable[[Array, Array, Array], Array], rotate: Map
) -> Float[Array, "B T D"]:
    """One pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        maps: the layer's maps.
        x: residual stream.
        attend: queries, keys and values of these tokens to the mixed values [B, T, N, H].
        rotate: queries or keys [B, T, N, H] to the same with their positions in them.
    """
    x = mark(x, "input")
    query, key, value = maps.qkv(maps.attn_norm(x))
    query, key, value = mark(rotate(query), "query"), mark(rotate(key), "key"), mark(value, "value")
    mixed = mark(attend(query, key, value), "heads")
    x = add(x, maps.out(mixed.reshape(*x.shape[:2], -1)), "attention")
    gate, up = maps.gate_up(maps.mlp_norm(x))
    gate, up = mark(gate, "gate"), mark(up, "up")
    neurons = mark(maps.activation(gate) * up, "neurons")
    return add(x, maps.down(neurons), "mlp")


def rotation(config: LlamaConfig, custom: Rotate | None, positions: Int[Array, "#B T"], *, length: int) -> Map:
    """Rotary positions, or `custom`; `length` is the context that dynamic and longrope scaling assume."""
    if custom is not None:
        return lambda x: custom(x, positions)
    frequencies, scaling = rope_frequencies(
        config.rope, head_dim=config.head_dim, max_length=config.max_length, length=length
    )
    cos, sin = rope_cos_sin(positions, frequencies, scaling)
    return lambda x: apply_rope(x, cos, sin)


def whole_attention(
    config: LlamaConfig,
    custom: Attend | None,
    positions: Int[Array, "#B T"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    softmax_dtype: Any = None,
) -> Callable[[Array, Array, Array], Array]:
    """Causal attention over whole sequences, or `custom`, in documents or in rows of `lengths` tokens."""
    # Causal, with a window; queries and keys are the same tokens.
    pattern = Pattern(True, config.sliding_window, segment_ids, segment_ids, lengths, lengths)
    if custom is not None:
        count = positions.shape[1]
        pairs = Pairs(dense_mask(pattern, count, count), positions, positions)
        return lambda query, key, value: custom(query, key, value, pairs)
    return functools.partial(
        attention,
        pattern=pattern,
        scale=config.head_dim**-0.5,
        implementation=config.attention,
        softmax_dtype=softmax_dtype,
    )


class LlamaLayer(nn.Module):
    """The parameters of one layer, for training and scoring; `dtype` is that of the sublayers."""

    config: LlamaConfig
    dtype: Any
    islands: Islands = DEFAULT_ISLANDS

    def setup(self) -> None:
        """Creates the projections and norms, named as in design.md."""
        c, norms = self.config, self.islands.norms
        queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        residual_std = c.init_std / (2 * c.num_layers) ** 0.5  # GPT-2: keeps the residual stream's variance
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

    def __call__(
        self, x: Float[Array, "B T D"], attend: Callable[[Array, Array, Array], Array], rotate: Map
    ) -> Float[Array, "B T D"]:
        """One layer over whole sequences; `attend` and `rotate` as `layer_body` takes them."""
        maps = LayerMaps(
            attn_norm=lambda h: self.attn_norm(h).astype(self.dtype),
            qkv=self._qkv,
            out=self.o_proj,
            mlp_norm=lambda h: self.mlp_norm(h).astype(self.dtype),
            gate_up=lambda h: (self.gate_proj(h), self.up_proj(h)),
            activation=ACTIVATIONS[self.config.activation],
            down=self.down_proj,
        )
        return layer_body(maps, x, attend, rotate)

    def _qkv(self, h: Array) -> tuple[Array, Array, Array]:
        c = self.config
        heads = (*h.shape[:2], -1, c.head_dim)
        query, key, value = (proj(h).reshape(heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if c.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, value


class Llama(FamilyModule):
    """The decoder; `dtype` is the compute dtype, parameters are created in float32."""

    config: LlamaConfig  # architecture
    dtype: Any = jnp.float32  # of activations and matmul inputs; logits are float32
    islands: Islands = DEFAULT_ISLANDS  # dtypes of what does not follow `dtype`
    # an own attention (`jaxllm.models.functions`), here and in decoding; None is `config.attention`
    attend: Attend | None = None
    rotate: Rotate | None = None  # own positions in queries and keys, here and in decoding; None is RoPE

    def setup(self) -> None:
        """Creates the embedding, the stacked layers, the last norm and the head."""
        c = self.config
        normal = nn.initializers.normal(c.init_std)
        self.embed = self.param("embed", normal, (c.vocab_size, c.d_model), MASTER)
        create_stack(self, self._init_layer, c.num_layers)
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
            ValueError: while tracing, for tokens that are not integers [B, T], or parameters of another model.
        """
        return self.logits(self.hidden(tokens, positions=positions, segment_ids=segment_ids, length=length))

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
        attend = whole_attention(c, self.attend, positions, segment_ids=segment_ids, softmax_dtype=self.islands.softmax)
        rotate = rotation(c, self.rotate, positions, length=length or tokens.shape[1])
        layer = LlamaLayer(c, self.dtype, self.islands, parent=None)
        x = apply_stack(
            lambda params, h, _: apply(layer, params, h, attend, rotate),
            self.get_variable("params", "layers"),
            embed(self.embed, tokens, dtype=self.dtype).astype(self.islands.residual or self.dtype),
            mode=c.layers,
            remat=c.remat,
        )
        return self.final_norm(x).astype(self.dtype)

    def lens(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits of any layer's residual stream, as `jaxllm.study` captures it: last norm, head (the logit lens)."""
        return self.logits(self.final_norm(x).astype(self.dtype))

    def _init_layer(self, key: Array) -> dict[str, Any]:
        c = self.config
        layer = LlamaLayer(c, self.dtype, parent=None)
        variables: Any = layer.init(key, jnp.zeros((1, 1, c.d_model)), lambda query, key, value: query, lambda x: x)
        return variables["params"]


def hidden(model: Llama, params: Any, batch: Mapping[str, Any], key: Array | None = None) -> Float[Array, "B T D"]:
    """Hidden states of a training batch: `tokens` [B, T], and `positions` and `segment_ids` if it has them."""
    del key  # Llama has no dropout
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
