"""Llama's decoding half: prompts into a cache, then one token at a time.

Pure functions on the decoding layout: one NamedTuple per layer instead of stacks, cast once, with q, k, v and gate, up
as one matrix each. A step reads every weight once and in few kernels. Out of scope: training, choosing tokens.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.config import LlamaConfig
from jaxllm.models import cache as kv
from jaxllm.models.cache import KVCache
from jaxllm.models.decoder import Decoder, Plan, check_methods, check_prepared
from jaxllm.models.layers import LayerMaps
from jaxllm.models.llama.model import Llama, layer_body, rotation, whole_attention
from jaxllm.models.model import check_params
from jaxllm.models.stack import Hold, decode_stack, embed_and_head, unstack
from jaxllm.ops.pointwise import ACTIVATIONS, rms_norm
from jaxllm.ops.stored import Matrix, project, stored


class Projection(NamedTuple):
    """x @ kernel (+ bias)."""

    kernel: Matrix
    bias: Array | None

    def __call__(self, x: Array) -> Array:
        """Maps the last axis; the bias is added before the sum is rounded, as in training."""
        if self.bias is None:
            return project(x, self.kernel)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return (project(x, self.kernel, dtype=wide) + self.bias.astype(wide)).astype(x.dtype)


class LayerParams(NamedTuple):
    """One layer; `qkv` and `gate_up` are concatenated on the output axis, head norms are None without qk_norm."""

    attn_norm: Array
    qkv: Projection
    q_norm: Array | None
    k_norm: Array | None
    out: Projection
    mlp_norm: Array
    gate_up: Projection
    down: Projection


class LlamaParams(NamedTuple):
    """The decoding layout of a Llama; the head is the embedding itself when tied and not quantised."""

    embed: Float[Array, "V D"]
    layers: tuple[LayerParams, ...]
    final_norm: Float[Array, " D"]
    head: Matrix


def prepare_for_decode(params: dict[str, Any], *, dtype: Any, int8: bool = False) -> LlamaParams:
    """The decoding layout of training parameters, in the compute dtype.

    With `int8`, all matrices but the embedding are stored as int8 with a float32 scale per output channel.
    """

    def joined(layer: dict[str, Any], *names: str) -> Projection:
        kernel, bias = ([layer[name][part] for name in names if part in layer[name]] for part in ("kernel", "bias"))
        matrix = stored(jnp.concatenate(kernel, axis=1), dtype=dtype, int8=int8)
        return Projection(matrix, jnp.concatenate(bias).astype(dtype) if bias else None)

    def norm(tree: dict[str, Any], name: str) -> Array | None:
        return tree[name]["weight"].astype(dtype) if name in tree else None

    layers = tuple(
        LayerParams(
            attn_norm=layer["attn_norm"]["weight"].astype(dtype),
            qkv=joined(layer, "q_proj", "k_proj", "v_proj"),
            q_norm=norm(layer, "q_norm"),
            k_norm=norm(layer, "k_norm"),
            out=joined(layer, "o_proj"),
            mlp_norm=layer["mlp_norm"]["weight"].astype(dtype),
            gate_up=joined(layer, "gate_proj", "up_proj"),
            down=joined(layer, "down_proj"),
        )
        for layer in unstack(params["layers"])
    )
    embed, head = embed_and_head(params, dtype=dtype, int8=int8)
    return LlamaParams(embed, layers, params["final_norm"]["weight"].astype(dtype), head)


def prefill(
    model: Llama,
    params: LlamaParams,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    *,
    capacity: int,
    length: int | None = None,
    dtype: Any = None,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Logits of the token after each prompt, and the cache.

    Args:
        model: its config, own attention and own positions are used.
        params: decoding layout.
        tokens: prompts, padded on the right.
        lengths: real tokens of each row, at least 1.
        capacity: slots of the cache; with a sliding window, its width is enough, and the cache wraps around.
        length: context length that dynamic and longrope scaling assume; None is `capacity`.
        dtype: of the cache; None is that of the parameters.

    Raises:
        ValueError: when the prompt exceeds the capacity and no window drops its beginning.
    """
    c, count = model.config, tokens.shape[1]
    positions = jnp.arange(count)[None]
    sizes = {"num_layers": c.num_layers, "num_kv_heads": c.num_kv_heads, "head_dim": c.head_dim}
    cache = kv.init_cache(batch=tokens.shape[0], capacity=capacity, dtype=dtype or params.embed.dtype, **sizes)
    update = kv.fill(cache, lengths, count, window=c.sliding_window)
    whole = whole_attention(c, model.attend, positions, lengths=lengths)
    rotate = rotation(c, model.rotate, positions, length=length or capacity)

    def layer(part: LayerParams, x: Array, hold: Hold) -> Array:
        def attend(query: Array, key: Array, value: Array) -> Array:
            hold(key, value)
            return whole(query, key, value)

        return layer_body(_maps(c, part), x, attend, rotate)

    x, cache = decode_stack(layer, params.layers, params.embed[tokens], cache, update, scope="layers")
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return _logits(c, params, last)[:, 0], cache


def decode_step(
    model: Llama,
    params: LlamaParams,
    cache: KVCache,
    tokens: Int[Array, " B"],
    positions: Int[Array, " B"],
    *,
    length: int | None = None,
    attended: int | None = None,
) -> tuple[Float[Array, "B V"], KVCache]:
    """Appends one token per row, at `positions` but all in the same slot; returns the logits of the next.

    It reads the first `attended` slots, or all; the others must be empty. `length` is as in `prefill`.
    """
    c = model.config
    turn = kv.append(cache, positions, model.attend, wraps=True, window=c.sliding_window, attended=attended)
    tokens = tokens[:, None]
    rotate = rotation(c, model.rotate, turn.pairs.query_positions, length=length or cache.positions.shape[1])

    def layer(part: LayerParams, x: Array, hold: Hold) -> Array:
        def attend(query: Array, key: Array, value: Array) -> Array:
            return turn.attend(query, *hold(key, value), turn.pairs, scale=c.head_dim**-0.5)

        return layer_body(_maps(c, part), x, attend, rotate)

    x, cache = decode_stack(layer, params.layers, params.embed[tokens], cache, turn.update, scope="layers")
    return _logits(c, params, x)[:, 0], cache


def _maps(c: LlamaConfig, layer: LayerParams) -> LayerMaps:
    norm = functools.partial(rms_norm, eps=c.norm_eps)

    def qkv(h: Array) -> tuple[Array, Array, Array]:
        heads = layer.qkv(h).reshape(*h.shape[:2], c.num_heads + 2 * c.num_kv_heads, c.head_dim)
        query, key, value = jnp.split(heads, [c.num_heads, c.num_heads + c.num_kv_heads], axis=2)
        if layer.q_norm is not None and layer.k_norm is not None:
            query, key = norm(query, layer.q_norm), norm(key, layer.k_norm)
        return query, key, value

    def gate_up(h: Array) -> tuple[Array, Array]:
        gate, up = jnp.split(layer.gate_up(h), 2, axis=-1)
        return gate, up

    return LayerMaps(
        attn_norm=lambda x: norm(x, layer.attn_norm),
        qkv=qkv,
        out=layer.out,
        mlp_norm=lambda x: norm(x, layer.mlp_norm),
        gate_up=gate_up,
        activation=ACTIVATIONS[c.activation],
        down=layer.down,
    )


def _logits(config: LlamaConfig, params: LlamaParams, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    return project(rms_norm(x, params.final_norm, eps=config.norm_eps), params.head, dtype=jnp.float32)


class LlamaDecoder(Decoder):
    """Llama's side of the decoding loops: a decoder continues its prompt."""

    def prepare(self, params: Any, *, int8: bool = False) -> LlamaParams:
        """See `Decoder`."""
        check_methods(type(self.model), Llama)
        if isinstance(params, LlamaParams):
            check_prepared(self.model, params.embed, decoder=(len(params.layers), self.model.config.num_layers))
            return params
        check_params(self.model, params)
        return prepare_for_decode(params, dtype=self.model.dtype, int8=int8)

    def check(self, prompts: Sequence[Sequence[int]], *, new: Sequence[int]) -> None:
        """See `Decoder`; only dynamic scaling extends the context."""
        c = self.model.config
        worst = max(range(len(prompts)), key=lambda i: len(prompts[i]) + new[i])
        longest, more = len(prompts[worst]), new[worst]
        context = int(c.max_length * (c.rope.factor or 1)) if c.rope.type == "dynamic" else c.max_length
        if longest + more - 1 > context:
            raise ValueError(
                f"prompt {worst} of {longest} tokens and {more} new ones need {longest + more - 1} positions, the "
                f"model's context has {context} (model.max_length); shorten the prompt or max_new_tokens"
            )

    def plan(self, *, prompt: int, new: int, needed: int, cache_dtype: str | None, wraps: bool) -> Plan:
        """See `Decoder`."""
        c = self.model.config
        slots = prompt + new
        if wraps and c.sliding_window is not None:
            slots = min(slots, c.sliding_window)
        # Only with these two does the length change the frequencies; others share one compiled program.
        length = needed if c.rope.type in ("dynamic", "longrope") else c.max_length
        return Plan(prompt, new, prompt, slots, length, cache_dtype)

    def start(self, params: Any, tokens: Array, lengths: Array, plan: Plan) -> tuple[Any, Array, KVCache, Array]:
        """See `Decoder`."""
        options = {"capacity": plan.slots, "length": plan.length, "dtype": plan.cache_dtype}
        logits, cache = prefill(self.model, params, tokens, lengths, **options)
        return None, logits, cache, lengths

    def step(
        self, params: Any, context: Any, cache: KVCache, tokens: Array, positions: Array, plan: Plan, attended: int
    ) -> tuple[Array, KVCache]:
        """See `Decoder`."""
        return decode_step(self.model, params, cache, tokens, positions, length=plan.length, attended=attended)
