"""cuDNN's attention through jax: which calls it gets, how documents are packed for it, and what it refuses.

`obstacle` has its limits; `AVOIDED` is one table of the classes of calls that are not trusted to it, so that a finding
is one row. `benchmarks/gpu/probe.py` compares a call of every class with float32 on a GPU and names the row that a bad
answer changes. `refused` recognises what it refuses in spite of both, by the error of the lowering or compilation.

The kernel has no mask: `document_codes` keeps the documents of a row apart (docs/gpu.md, Documents in one row).
"""

import dataclasses
import logging
import math
import re
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.config import ModelConfig
from jaxllm.ops import backend
from jaxllm.ops.masks import Pattern

_log = logging.getLogger(__name__)

R = TypeVar("R")


class Call(NamedTuple):
    """What a class may depend on; a bias counts as one with a gradient.

    `generation` is the major compute capability of the GPU, 9 for Hopper. `width` is that of a head, which ends with
    document codes where it is `packed`. `lengths` is cuDNN's padding mask: the number of real keys of each row.
    """

    generation: int
    dtype: str
    queries: int
    keys: int
    width: int
    causal: bool = False
    window: bool = False
    bias: bool = False
    lengths: bool = False
    packed: bool = False


class CallClass(NamedTuple):
    """Attention calls with a known or suspected fault of cuDNN; those in `AVOIDED` go to blocks in plain JAX."""

    name: str  # what the calls have in common
    holds: Callable[[Call], bool]  # whether a call is one of them
    reason: str = "none"  # what is wrong, or what may be
    evidence: str = "none"  # who has seen it, and where


# Classes that may have to join these are `SUSPECTS` of `benchmarks.gpu.attention_calls`.
AVOIDED = (
    CallClass(
        "bias, 64 keys beyond a multiple of 128",
        lambda call: call.generation == 9 and call.bias and call.keys % 128 == 64,
        reason="the gradient of a query is NaN on Hopper where all of its scores are below about -89",
        evidence="pytorch#196678 and cudnn-frontend#628: cuDNN 9.20 to 9.30 on H100 and H200",
    ),
)


def avoided(call: Call) -> CallClass | None:
    """The first row that keeps a call from cuDNN."""
    return next((row for row in AVOIDED if row.holds(call)), None)


# Compiler errors: by cuDNN's frontend and XLA's callers of it, and by a machine that is at fault instead of the call.
_REFUSED = ("cudnn", "fmha", "no valid engine", "execution plan")
_OTHERS = re.compile(
    "resource_exhausted|out of memory|alloc_failed|not_initialized|initialization failed|execution_failed"
    "|internal_error|deadline_exceeded"
)
_HEAD = 600  # characters of a message that state its cause; programs and tables of buffers follow

# What jax's checks of a cuDNN attention raise before there is a program to compile, in
# jax/_src/cudnn/fused_attention_stablehlo.py of jax 0.10.2 and 0.11.2.
_REFUSED_BEFORE: dict[type[BaseException], re.Pattern[str]] = {
    RuntimeError: re.compile("cudnn"),  # "cuDNN is not detected."
    NotImplementedError: re.compile(
        "cudnn version|q must be fp16/bf16|the head dim must be <=|unsupported sequence length q"
        "|packed layout requires a gpu|currently only support batch_dim"
    ),
    ValueError: re.compile(
        "qkv rank must be same|qkv dtype must be same|q must have a rank of 4|qk must have same head dim"
        "|kv must have same|bias must have same seq length|q_seqlen must have|kv_seqlen must have"
        "|query, key and value should have same sharding|query and bias should have same sharding"
        "|sharding on (bias )?sequence dim|sharding on head dim"
    ),
}


def refused(error: BaseException) -> bool:
    """Whether cuDNN cannot run an attention, by an error of the compiler or of jax's checks."""
    text = str(error).lower()
    if isinstance(error, jax.errors.JaxRuntimeError):
        return any(sign in text[:_HEAD] for sign in _REFUSED) and not _OTHERS.search(text)
    # The exact class: errors of this package are subclasses.
    before = _REFUSED_BEFORE.get(type(error))
    return before is not None and bool(before.search(text))


def or_chunked(use: Callable[[ModelConfig], R], config: ModelConfig) -> R:
    """`use(config)`; if cuDNN refuses a call of `attention: auto`, `use` of the config with `attention: chunked`.

    jax compiles in the first call, which raises the refusal before anything is donated. Other errors are raised.
    """
    try:
        return use(config)
    except Exception as error:
        if config.attention != "auto" or not any(refused(each) for each in (error, error.__cause__) if each):
            raise
        cause = str(error).splitlines()[0].split("; set ")[0]
        _log.warning("attention: chunked instead of auto, because cuDNN refused a call: %s", cause)
    return use(dataclasses.replace(config, attention="chunked"))


def calls_in(program: str) -> list[str]:
    """The distinct cuDNN attentions of a lowered program (StableHLO), each with the shapes of query and key."""
    found = re.findall(r"@__cudnn\$(fmha\w+)\(.*: \(tensor<(\w+)>, tensor<(\w+)>", program)
    return [f"{name} [{query}] [{key}]" for name, query, key in dict.fromkeys(found)]


# Penalty of a scaled score for each sign that differs. At 104 exp underflows in float32; the rest is headroom for
# scores of other documents, which reach hundreds. More would cost digits: every equal sign adds half a margin.
_MARGIN = 256.0


def obstacle(query: Array, key: Array, *, pattern: Pattern, bias: Array | None) -> str | None:
    """Why `fused_attention` can't run this on an NVIDIA GPU, or None: checks of jax and cuDNN, and avoided calls."""
    call = call_of(query, key, pattern=pattern, bias=bias)
    batch, length, heads, width = query.shape
    keys = key.shape[1]
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN needs float16 or bfloat16, got {query.dtype}"
    largest = 256 if call.generation >= 9 else 128
    if call.generation < 8:
        return "cuDNN's fused attention needs an NVIDIA GPU of the Ampere generation or newer"
    if width % 8 or call.width > largest:
        codes = f" with document codes to {call.width}" if call.packed else ""
        return f"cuDNN needs head_dim a multiple of 8 up to {largest}, got {width}{codes}"
    if call.causal and length != keys:
        return f"cuDNN aligns a causal mask at the top left, which differs for {length} queries and {keys} keys"
    if call.window and not call.causal:
        return "cuDNN has a window for causal attention only"
    if call.window and call.lengths:
        return "cuDNN leaves the output undefined where a window holds padding only"
    if bias is not None and (length % 2 or keys % 2):
        return f"cuDNN differentiates a bias at even lengths only, got {length} and {keys}"
    if bias is not None and bias.shape not in ((1, heads, length, keys), (batch, heads, length, keys)):
        return f"cuDNN broadcasts a bias over the batch only, got {bias.shape}"
    row = avoided(call)
    return None if row is None else f"cuDNN is not trusted with {row.name}: {row.reason} ({row.evidence})"


def call_of(query: Array, key: Array, *, pattern: Pattern, bias: Array | None) -> Call:
    """The call of cuDNN as `AVOIDED` describes it."""
    (_, length, _, width), keys = query.shape, key.shape[1]
    packed = pattern.query_segments is not None
    generation = backend.gpu_generation()
    return Call(
        generation=9 if generation is None else generation,  # a machine without a GPU lowers for Hopper
        dtype=str(query.dtype),
        queries=length,
        keys=keys,
        width=width + code_width(max(length, keys)) if packed else width,
        causal=pattern.causal,
        window=pattern.window is not None,
        bias=bias is not None,
        lengths=_lengths_for_cudnn(pattern) is not None,
        packed=packed,
    )


def _lengths_for_cudnn(pattern: Pattern) -> Array | None:
    """Real keys of each row, at least one: cuDNN 9.22 gives NaN for a row without keys (cudnn-frontend#943).

    None for a causal row, where padding comes after all that its real queries see. With `some_keys` the model has
    bounded the lengths once. Bounds made here are computed again in every layer and its backward pass.
    """
    if pattern.key_lengths is None or (pattern.causal and pattern.query_lengths is not None):
        return None
    return pattern.key_lengths if pattern.some_keys else jnp.maximum(pattern.key_lengths, 1)


def fused_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    pattern: Pattern,
    scale: float,
    bias: Float[Array, "#B N T S"] | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T N H"]:
    """Attention as `jaxllm.ops.attention` defines it, except for rows without keys.

    cuDNN may leave NaN in a row without keys and saves it for the backward pass. Times a gradient of 0 it would reach
    the keys of other rows. So every row has at least one key, and rows of padding are set to zero afterwards. A row
    with `key_lengths` 0 and no `query_lengths` gives its first value instead of zeros.

    `implementation` xla gives the same operands to jax's own definition, which tests the codes without a GPU.
    """
    width, length = query.shape[-1], query.shape[1]
    query_segments, key_segments = pattern.query_segments, pattern.key_segments
    real = _real_queries(length, query_segments, pattern.query_lengths)
    lengths = _lengths_for_cudnn(pattern)
    if query_segments is not None and key_segments is not None:
        query, key, value = append_codes(query, key, value, query_segments, key_segments, scale=scale)
    mixed = jax.nn.dot_product_attention(
        query,
        key,
        value,
        # A float32 bias with low-precision queries gave NaN gradients in jax.
        bias=None if bias is None else bias.astype(query.dtype),
        scale=scale,
        is_causal=pattern.causal,
        # All queries. Without it jax makes a constant, which jax's rule for vmap mistakes for one of the rows.
        query_seq_lengths=None if lengths is None else length + 0 * lengths,
        key_value_seq_lengths=lengths,
        local_window_size=None if pattern.window is None else (pattern.window - 1, 0),
        implementation=implementation,
    )[..., :width]
    return mixed if real is None else jnp.where(real[..., None, None], mixed, 0)


def _real_queries(length: int, segments: Array | None, lengths: Array | None) -> Array | None:
    inside = None if lengths is None else jnp.arange(length) < lengths[:, None]
    if segments is None:
        return inside
    return segments > 0 if inside is None else inside & (segments > 0)


def code_width(documents: int) -> int:
    """Dimensions of a code for as many documents as a row can hold, a multiple of 8 as cuDNN requires."""
    return 8 * math.ceil(documents.bit_length() / 8)


def append_codes(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    *,
    scale: float,
) -> tuple[Array, Array, Array]:
    """Queries and keys with their document's code appended to each head, and values with zeros."""
    documents = max(query.shape[1], key.shape[1])
    size = jnp.asarray(math.sqrt(_MARGIN / (2 * scale)), query.dtype)  # margin = 2 * scale * size^2
    return (
        _append(query, size * document_codes(query_segments, documents, query.dtype)),
        _append(key, size * document_codes(key_segments, documents, key.dtype)),
        _append(value, jnp.zeros((*key_segments.shape, code_width(documents)), value.dtype)),
    )


def document_codes(segments: Int[Array, "B T"], documents: int, dtype: jnp.dtype) -> Float[Array, "B T W"]:
    """A code of signs for each number 0 .. `documents`, followed by zeros.

    The signs are the bits of n ^ 2n. Those of two numbers differ in at least two bits, or in at least one where the
    width has no room for the last bit.
    """
    width, signs = code_width(documents), documents.bit_length() + 1
    bits = ((segments ^ (segments << 1))[..., None] >> jnp.arange(width)) & 1
    return jnp.where(jnp.arange(width) < signs, 2 * bits - 1, 0).astype(dtype)


def _append(x: Float[Array, "B T N H"], code: Float[Array, "B T W"]) -> Float[Array, "B T N I"]:
    return jnp.concatenate([x, jnp.broadcast_to(code[:, :, None], (*x.shape[:3], code.shape[-1]))], axis=-1)
