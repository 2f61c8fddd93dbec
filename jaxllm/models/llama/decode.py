"""Llama's decoding half: prompts into a cache, then one or several tokens at a time.

Pure functions on the decoding layout: one NamedTuple per layer instead of stacks, cast once, with q, k, v and gate, up
as one matrix each, so that a step reads every weight once and in few kernels. Layers are unrolled, because a scan
over stacked weights would slice (copy) them at every step. Out of scope: training, choosing tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.config import LlamaConfig
from jaxllm.models import cache as kv
from jaxllm.models.cache import KVCache
from jaxllm.models.functions import Pairs
from jaxllm.models.llama.layer import Parts, layer_body, rotation, whole_attention
from jaxllm.models.llama.model import Llama
from jaxllm.models.stack import Hold, decode_stack, unstack
from jaxllm.ops.activations import ACTIVATIONS
from jaxllm.ops.matrices import Matrix, Rows, project, stored
from jaxllm.ops.norms import rms_norm


class Projection(NamedTuple):
    """x @ kernel (+ bias)."""

    kernel: Matrix
    bias: Array | None

    def __call__(self, x: Array) -> Array:
        """Maps the last axis; a bias joins the accumulator before it is rounded, as in training."""
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

    Args:
        params: as `init_params` or a checkpoint holds them.
        dtype: of the weights that are not quantised, and of the computation.
        int8: store all matrices but the embedding as int8 with a float32 scale per output channel.
    """
    store = functools.partial(stored, dtype=dtype, int8=int8)

    def joined(layer: dict[str, Any], *names: str) -> Projection:
        kernel, bias = ([layer[name][part] for name in names if part in layer[name]] for part in ("kernel", "bias"))
        return Projection(store(jnp.concatenate(kernel, axis=1)), jnp.concatenate(bias).astype(dtype) if bias else None)

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
    embed = params["embed"].astype(dtype)
    tied = "lm_head" not in params
    head = Rows(embed) if tied and not int8 else store(params["embed" if tied else "lm_head"].T)
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
        model: its config, and its own attention and positions where it has them.
        params: decoding layout.
        tokens: prompts, padded on the right.
        lengths: real tokens of each row, at least 1.
        capacity: slots of the cache; a sliding window needs no more than it is wide, and then wraps around.
        length: context length that dynamic and longrope scaling assume; None is `capacity`.
        dtype: of the cache; None is that of the parameters.

    Raises:
        ValueError: when the prompt exceeds the capacity and no window lets its beginning go.
    """
    c, (batch, count) = model.config, tokens.shape
    positions = jnp.arange(count)[None]
    cache = kv.init_cache(
        batch=batch,
        capacity=capacity,
        num_layers=c.num_layers,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        dtype=dtype or params.embed.dtype,
    )
    update = kv.fill(cache, lengths, count, window=c.sliding_window)
    attend = whole_attention(c, model.attend, positions, lengths=lengths)
    rotate = rotation(c, model.rotate, positions, length=length or capacity)

    def layer(part: LayerParams, x: Array, hold: Hold) -> Array:
        def attend_new(query: Array, key: Array, value: Array) -> Array:
            hold(key, value)
            return attend(query, key, value)

        return layer_body(_parts(c, part), x, attend_new, rotate)

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
    """Appends one token per row, all in the same slot, and returns the logits of the next.

    Args:
        model: as in `prefill`.
        params: decoding layout.
        cache: from `prefill` or an earlier step.
        tokens: one per row.
        positions: of those tokens in their rows.
        length: as in `prefill`.
        attended: read only so many first slots; the caller knows that the rest is empty. None reads all.
    """
    update, columns = kv.append(cache, positions, wraps=True), positions[:, None]
    pairs = kv.visible_pairs(update.positions[:, :attended], columns, window=model.config.sliding_window)
    look = kv.attend_by(model.attend, kv.attend_one)
    logits, cache = _through_cache(model, params, cache, tokens[:, None], update, pairs, look, length)
    return logits[:, 0], cache


def extend(
    model: Llama,
    params: LlamaParams,
    cache: KVCache,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    *,
    length: int | None = None,
) -> tuple[Float[Array, "B T V"], KVCache]:
    """Appends T tokens per row as `kv.extend` does, and returns the logits after each."""
    update = kv.extend(cache, positions)
    pairs = kv.visible_pairs(update.positions, positions, window=model.config.sliding_window)
    look = kv.attend_by(model.attend, kv.attend_many)
    return _through_cache(model, params, cache, tokens, update, pairs, look, length)


def _through_cache(
    model: Llama,
    params: LlamaParams,
    cache: KVCache,
    tokens: Int[Array, "B T"],
    update: kv.Update,
    pairs: Pairs,
    look: Callable[..., Array],
    length: int | None,
) -> tuple[Float[Array, "B T V"], KVCache]:
    c = model.config
    rotate = rotation(c, model.rotate, pairs.query_positions, length=length or cache.positions.shape[1])

    def layer(part: LayerParams, x: Array, hold: Hold) -> Array:
        def attend(query: Array, key: Array, value: Array) -> Array:
            return look(query, *hold(key, value), pairs, scale=c.head_dim**-0.5)

        return layer_body(_parts(c, part), x, attend, rotate)

    x, cache = decode_stack(layer, params.layers, params.embed[tokens], cache, update, scope="layers")
    return _logits(c, params, x), cache


def _parts(c: LlamaConfig, layer: LayerParams) -> Parts:
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

    return Parts(
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
