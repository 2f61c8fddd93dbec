"""Scaled dot-product attention with grouped key/value heads; one dispatcher, and paths that give the same result.

`reference` builds all scores and is the definition. `chunked` works by blocks of queries and leaves out the keys that a
causal block can't see (`jaxllm.ops.chunked_attention`). `cudnn` is the fused kernel of NVIDIA GPUs
(`jaxllm.ops.cudnn`). `auto` takes `chunked` where jax refuses cuDNN while it traces. Grouped heads are never
repeated: query heads are folded as [K, G]. Out of scope: projections, RoPE, caches.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxllm.ops import backend, cudnn
from jaxllm.ops.chunked_attention import QUERY_BLOCK, chunked_attention
from jaxllm.ops.linear import einsum
from jaxllm.ops.masks import Pattern

_log = logging.getLogger(__name__)

# Initialisation and prompts of a few tokens may take another path than the run does: their path is not logged.
_TRIVIAL = 32

Drop = Callable[[Array], Array]


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    pattern: Pattern,
    scale: float,
    bias: Float[Array, "#B N T S"] | None = None,
    implementation: str = "auto",
    drop: Drop | None = None,
    softmax_dtype: Any = None,
) -> Float[Array, "B T N H"]:
    """softmax(scale * q k^T + bias) v over the keys that `pattern` shows; a query that sees none gives zeros.

    cuDNN has one exception, see `fused_attention`. Only path `reference` holds the softmax's weights, to which `drop`
    (dropout, as a function) is applied, and has a choice of their dtype (`softmax_dtype`; None is float32). ValueError
    for an implementation that cannot do this, with the reason and an implementation that can.
    """
    if drop is not None or softmax_dtype not in (None, jnp.float32):
        if implementation not in ("auto", "reference"):
            missing = "dropout; use attention: auto or dropout_rate: 0"
            if drop is None:
                missing = "other softmax; use attention: auto or no softmax island"
            raise ValueError(f"attention: {implementation} has no {missing}")
        implementation = "reference"
    chosen = choose(implementation, query, key, pattern=pattern, bias=bias)
    if chosen == "cudnn":
        try:
            return cudnn.fused_attention(query, key, value, pattern=pattern, scale=scale, bias=bias)
        except Exception as error:
            if implementation != "auto" or not cudnn.refused(error):
                raise
            _announce(f"attention: chunked ({str(error).splitlines()[0]})")
            chosen = "chunked"
    if chosen == "chunked":
        return chunked_attention(query, key, value, pattern=pattern, scale=scale, bias=bias)
    mask = pattern.mask(range(query.shape[1]), range(key.shape[1]))
    return masked_attention(
        query, key, value, mask=mask, scale=scale, bias=bias, drop=drop, softmax_dtype=softmax_dtype
    )


def choose(implementation: str, query: Array, key: Array, *, pattern: Pattern, bias: Array | None = None) -> str:
    """The path that `attention` takes, logged once by name; one query per row needs no kernel."""
    if query.shape[1] == 1:
        return "reference"
    obstacle = cudnn.obstacle(query, key, pattern=pattern, bias=bias)
    if implementation == "cudnn" and obstacle:
        raise ValueError(f"attention: cudnn cannot run this: {obstacle}; use attention: auto or chunked")
    if implementation != "auto":
        return implementation
    chosen, reason = ("chunked" if query.shape[1] >= QUERY_BLOCK else "reference"), ""
    if backend.on_gpu() and obstacle:
        reason = f" ({obstacle})"
    elif backend.on_gpu():
        packed = pattern.query_segments is not None
        chosen, reason = "cudnn", " (packed documents by codes in the heads)" if packed else ""
    if query.shape[1] > _TRIVIAL:
        _announce(f"attention: {chosen}{reason}")
    return chosen


@functools.cache
def _announce(note: str) -> None:
    """Logs a note once."""
    _log.info(note)


def masked_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    mask: Array | None,
    scale: float,
    bias: Float[Array, "#B N T S"] | None = None,
    drop: Drop | None = None,
    softmax_dtype: Any = None,
) -> Float[Array, "B T N H"]:
    """The definition, with all scores in memory; `mask` is [T, S] or [B, T, S], True = attend.

    The softmax is float32 or `softmax_dtype`, and a fully masked row is zero, not NaN.
    """
    batch, length, heads, width = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, width)  # [B, T, K, G, H]
    wide = softmax_dtype or jnp.promote_types(query.dtype, jnp.float32)
    products = einsum("btkgh,bskh->bkgts", grouped, key)
    with jax.named_scope("softmax"):
        scores = jnp.asarray(scale, wide) * products.astype(wide)
        if bias is not None:
            scores += bias.astype(wide).reshape(bias.shape[0], kv_heads, heads // kv_heads, *bias.shape[2:])
        weights = _softmax(scores, mask).astype(query.dtype)
    # A hook point of jaxllm.study, by query heads.
    by_head = weights.reshape(batch, heads, *weights.shape[3:])
    weights = checkpoint_name(by_head, "attention_weights").reshape(weights.shape)
    if drop is not None:
        weights = drop(weights)
    return einsum("bkgts,bskh->btkgh", weights, value).reshape(query.shape)


def _softmax(scores: Float[Array, "B K G T S"], mask: Array | None) -> Float[Array, "B K G T S"]:
    if mask is None:
        return jax.nn.softmax(scores, axis=-1)
    mask = mask[None, None, None] if mask.ndim == 2 else mask[:, None, None]
    # -inf would give NaN in a row that sees nothing. The finite minimum and the second where make it zero.
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min), axis=-1)
    return jnp.where(mask, weights, 0)
