"""Calls of cuDNN's attention as jaxllm makes them: each compared with float32, timed, and judged.

`benchmarks.gpu.probe` prints what comes of it. A verdict is right, wrong, refused, slow or failed, and `change` names
the row that a bad one moves from `SUSPECTS` into `jaxllm.ops.cudnn.AVOIDED`.
"""

import functools
import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxllm.ops.attention import masked_attention
from jaxllm.ops.cudnn import AVOIDED, Call, CallClass, call_of, fused_attention, refused
from jaxllm.ops.masks import Pattern

# Classes that cuDNN may get wrong, from the narrowest to all calls; none of them has run on a card yet.
SUSPECTS = (
    CallClass(
        "bias and lengths",
        lambda call: call.bias and call.lengths,
        reason="cuDNN's frontend allows a bias gradient with a padding mask from 9.5 on; Transformer Engine refuses it",
        evidence="sources of both; no report of a wrong answer",
    ),
    CallClass(
        "window and bias",
        lambda call: call.window and call.bias,
        reason="cuDNN's frontend allows it from 9.10.2 on; Transformer Engine refuses it",
        evidence="sources of both",
    ),
    CallClass(
        "bias rows that are not a multiple of 16 bytes",
        lambda call: call.bias and call.keys % 8 != 0,
        reason="a row of T5's decoder of 114 has 228 bytes, which no vector load fits",
        evidence="derived; no report",
    ),
    CallClass(
        "document codes beyond a head of 128",
        lambda call: call.packed and call.width > 128,
        reason="kernels for heads wider than 128 are others, and slow in the backward pass",
        evidence="derived; no report",
    ),
    CallClass(
        "document codes",
        lambda call: call.packed,
        reason="a head of 72 or 80 is padded to 128",
        evidence="derived; no report",
    ),
    CallClass(
        "queries that fill no tile, without any mask",
        lambda call: not (call.causal or call.lengths or call.bias) and call.queries % 64 != 0,
        reason="gradients of keys are NaN on Hopper for one query whose scores are strongly negative; with lengths not",
        evidence="cudnn-frontend#1072 (cuDNN 9.25 and 9.26); one query takes path `reference` here",
    ),
    CallClass("bias", lambda call: call.bias, reason="its gradient takes a workspace", evidence="source"),
    CallClass("window", lambda call: call.window),
    CallClass("lengths", lambda call: call.lengths),
    CallClass("float16", lambda call: call.dtype == "float16"),
    CallClass("all calls", lambda call: True),
)
# Largest relative error of a result, as norms: jax's own formula has 2e-3 to 3e-3 in bfloat16, on a CPU.
LARGEST_ERROR = {"bfloat16": 1e-2, "float16": 2e-3}
# Rows, positions and query heads of the comparison: what float32 on a CPU does in a second.
_CHECKED = (2, 512, 8)


class Attention(NamedTuple):
    """One call of cuDNN's attention."""

    batch: int  # rows
    queries: int  # length of a row
    keys: int  # length of a row
    heads: int  # of queries
    kv_heads: int  # of keys and values
    width: int  # of a head, without document codes
    causal: bool = False  # whether keys after the query are masked
    window: int | None = None  # last positions that are seen; None is all
    bias: bool = False  # whether the scores have one
    lengths: bool = False  # whether rows have lengths; in the comparison one row is shorter
    documents: int = 0  # documents of a row, told apart by codes; 0 is none
    dtype: str = "bfloat16"  # of the operands
    trained: bool = True  # whether there is a backward pass
    negative: bool = False  # scores around -120, where exp(-logsumexp) overflows; only judged by being finite
    # TFLOP/s of the forward and the backward pass on an H100 below which the call is slow
    least: tuple[float, float] = (0.0, 0.0)
    compare: str = ""  # the case that shows what the alternative costs


_LLAMA_1B = Attention(8, 4096, 4096, 32, 8, 64, causal=True, least=(200, 150))
_LLAMA_8B = Attention(2, 8192, 8192, 32, 8, 128, causal=True, least=(350, 250))
_ENCODER = Attention(64, 512, 512, 16, 16, 64, bias=True, lengths=True, least=(150, 150))
# The forward pass of a decoder takes 57 us at 30 TFLOP/s, no longer than the host needs to start it.
_DECODER = Attention(64, 114, 114, 16, 16, 64, causal=True, bias=True, least=(10, 30))
_CROSS = Attention(64, 114, 512, 16, 16, 64, lengths=True, least=(75, 75))
_PREFILL = Attention(1, 512, 512, 32, 8, 128, causal=True, lengths=True, trained=False)
# In order of worth: a clock may leave out the end.
ATTENTION = {
    "llama_1b": _LLAMA_1B,
    "t5_encoder": _ENCODER._replace(compare="t5_encoder_nolengths"),
    "t5_decoder": _DECODER._replace(compare="t5_decoder_128"),
    "t5_cross": _CROSS,
    "llama_8b": _LLAMA_8B,
    "negative_bias_320": Attention(2, 320, 320, 8, 8, 64, bias=True, negative=True),
    "t5_encoder_nolengths": _ENCODER._replace(lengths=False, compare="t5_encoder_codes"),
    "t5_encoder_codes": _ENCODER._replace(lengths=False, documents=1),
    "t5_encoder_nobias": _ENCODER._replace(bias=False),
    "t5_decoder_128": _DECODER._replace(queries=128, keys=128),
    "llama_1b_packed": _LLAMA_1B._replace(documents=4, least=(100, 75), compare="llama_1b"),
    "llama_8b_packed": _LLAMA_8B._replace(documents=4, least=(150, 75), compare="llama_8b"),
    "t5_packed": _ENCODER._replace(lengths=False, documents=4, least=(75, 75)),
    "t5_encoder_fp16": _ENCODER._replace(dtype="float16"),
    "llama_1b_fp16": _LLAMA_1B._replace(dtype="float16"),
    "prefill_512": _PREFILL,
    "prefill_16": _PREFILL._replace(queries=16, keys=16),
    "t5_prefill": _ENCODER._replace(batch=1, trained=False, least=(0, 0)),
    "window": _LLAMA_8B._replace(window=1024, least=(0, 0)),
    "negative_cross": _CROSS._replace(batch=2, heads=8, kv_heads=8, lengths=False, negative=True, least=(0, 0)),
    "negative_causal_320": Attention(2, 320, 320, 8, 8, 64, causal=True, negative=True),
    "window_bias": Attention(2, 512, 512, 8, 8, 64, causal=True, window=128, bias=True),
}


def small(case: Attention) -> Attention:
    """The call at toy sizes; in bfloat16, since jax's formula has no float16 on CPUs."""
    length = min(case.queries, 32)
    window = case.window and 8
    sizes = {"batch": 2, "queries": length, "keys": min(case.keys, 32), "heads": 4, "kv_heads": 2, "width": 8}
    return case._replace(**sizes, window=window, dtype="bfloat16", least=(0, 0), compare="")


def checked(case: Attention) -> Attention:
    """The call at the size of the comparison: as many heads per key head, and lengths of the same remainder."""
    rows, most, heads = _CHECKED
    groups = case.heads // case.kv_heads
    shorter = {name: min(size, most) for name, size in (("queries", case.queries), ("keys", case.keys))}
    kv_heads = max(min(case.heads, heads) // groups, 1)
    window = case.window and min(case.window, 128)
    return case._replace(batch=rows, heads=kv_heads * groups, kv_heads=kv_heads, window=window, **shorter)


class Operands(NamedTuple):
    """Arrays of one call."""

    inputs: tuple[np.ndarray, ...]  # query, key, value, and the bias where there is one
    slope: np.ndarray  # gradient of the output
    hidden: dict[str, Any]  # the arrays of the call's `Pattern`, by field


def operands(case: Attention, *, ragged: bool = False, empty: bool = False) -> Operands:
    """Random numbers, repeated where there are many; `ragged` makes one row shorter than the others.

    With `empty` the arrays are uninitialised, which is enough to compile for them.
    """
    c, dtype = case, np.dtype(getattr(ml_dtypes, case.dtype, case.dtype))
    block = np.random.default_rng(0).standard_normal(1_000_003, np.float32)

    def draw(*shape: int, shift: int) -> np.ndarray:
        if empty:
            return np.empty(shape, dtype)
        return np.resize(np.roll(block, shift * 1013).astype(dtype), shape)

    query = draw(c.batch, c.queries, c.heads, c.width, shift=0)
    key, value = (draw(c.batch, c.keys, c.kv_heads, c.width, shift=i) for i in (1, 2))
    if c.negative and not empty:
        query, key = (0.1 * query).astype(dtype), (0.1 * key).astype(dtype)
        query[..., 0], key[..., 0] = 1, -120 * c.width**0.5
    bias = (draw(1, c.heads, c.queries, c.keys, shift=3),) if c.bias else ()
    slope = draw(c.batch, c.queries, c.heads, c.width, shift=4)
    return Operands((query, key, value, *bias), slope, _hidden(case, ragged=ragged))


def _hidden(case: Attention, *, ragged: bool) -> dict[str, Any]:
    arrays = {}
    if case.lengths:
        lengths = np.full(case.batch, case.keys, np.int32)
        lengths[0] -= case.keys // 4 if ragged else 0
        arrays["key_lengths"] = lengths
        if case.queries == case.keys:
            arrays["query_lengths"] = lengths
    if case.documents:
        for side, length in (("query_segments", case.queries), ("key_segments", case.keys)):
            ids = np.arange(length, dtype=np.int32) * case.documents // length + 1
            arrays[side] = np.tile(ids, (case.batch, 1))
    return arrays


def call(case: Attention, implementation: Any, inputs: Any, hidden: dict[str, Any]) -> jax.Array:
    """The attention of a case: by cuDNN, by jax's own formula (xla), or as this library defines it (exact)."""
    query, key, value, *bias = inputs
    pattern, scale = Pattern(causal=case.causal, window=case.window, **hidden), case.width**-0.5
    added = bias[0] if bias else None
    if implementation == "exact":
        mask = pattern.mask(range(case.queries), range(case.keys))
        return masked_attention(query, key, value, mask=mask, scale=scale, bias=added)
    return fused_attention(query, key, value, pattern=pattern, scale=scale, bias=added, implementation=implementation)


def passes(case: Attention, implementation: Any, given: Any) -> tuple[jax.Array, ...]:
    """Output and gradients of `Operands`; without gradients where none is ever wanted."""
    inputs, slope, hidden = given
    if not case.trained:
        return (call(case, implementation, inputs, hidden),)
    out, pull = jax.vjp(lambda *args: call(case, implementation, args, hidden), *inputs)
    return out, *pull(slope.astype(out.dtype))


def exact(case: Attention) -> list[np.ndarray]:
    """What the comparison should give: the definition in float32, on the CPU."""
    host = _host()
    given = operands(case, ragged=True)
    wide = given._replace(inputs=tuple(x.astype(np.float32) for x in given.inputs))
    with jax.default_device(host), jax.default_matmul_precision("highest"):
        found = jax.jit(functools.partial(passes, case, "exact"))(jax.device_put(wide, host))
    return [np.asarray(x) for x in found]


def _host() -> Any:
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return jax.devices()[0]


class Prepared(NamedTuple):
    """What a thread makes of one call."""

    want: list[np.ndarray]  # what the comparison should give
    compared: Callable[..., Any]  # the compiled call at the comparison's size
    ahead: Callable[..., Any]  # the compiled forward pass at the real size
    whole: Callable[..., Any]  # both passes at the real size
    finite: Callable[..., Any]  # whether all that these return is
    seconds: float  # for compiling


@functools.cache
def prepare(case: Attention, implementation: str) -> Prepared:
    """Compiles a call for the default device; at toy sizes some are the same."""
    fewer, start = checked(case), time.monotonic()
    compared = jax.jit(functools.partial(passes, fewer, implementation)).lower(operands(fewer, ragged=True)).compile()
    given = operands(case, empty=True)
    ahead = jax.jit(functools.partial(call, case, implementation)).lower(given.inputs, given.hidden).compile()
    whole = jax.jit(functools.partial(passes, case, implementation)).lower(given)
    finite = jax.jit(_finite).lower(whole.out_info).compile()
    return Prepared(exact(fewer), compared, ahead, whole.compile(), finite, time.monotonic() - start)


def _finite(found: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in found]))


def attend(case: Attention, ready: Future[Prepared], row: CallClass) -> dict[str, Any]:
    """Compares and times one call, and adds what its verdict changes; `row` is its row of the table."""
    try:
        program = ready.result(timeout=60)
    except Exception as error:
        found = failed(error)
        return {**found, "change": change(case, found["verdict"], row), "class": row.name}
    errors = differences(program.compared(jax.device_put(operands(checked(case), ragged=True))), program.want)
    given = jax.device_put(operands(case))
    finite = bool(program.finite(program.whole(given))) and bool(np.isfinite(list(errors.values())).all())
    speed = speeds(case, timed(program.ahead, given.inputs, given.hidden), timed(program.whole, given))
    result = verdict(case, errors, speed, finite=finite)
    facts = {"verdict": result, "change": change(case, result, row), "class": row.name, "errors": errors}
    return {**facts, "finite": finite, **speed, "compile_seconds": round(program.seconds, 2)}


def narrowest(call: Call) -> CallClass:
    """The first row that a call belongs to, which a finding about the call changes."""
    return next(row for row in (*AVOIDED, *SUSPECTS) if row.holds(call))


def row_of(case: Attention) -> CallClass:
    """The row of the table that a finding about a case changes."""
    shapes = ((case.batch, case.queries, case.heads, case.width), (case.batch, case.keys, case.kv_heads, case.width))
    pattern = Pattern(causal=case.causal, window=case.window, **_hidden(case, ragged=False))
    rows = []

    def look(query: jax.Array, key: jax.Array) -> None:
        rows.append(narrowest(call_of(query, key, pattern=pattern, bias=query if case.bias else None)))

    jax.eval_shape(look, *(jax.ShapeDtypeStruct(shape, case.dtype) for shape in shapes))
    return rows[0]


def differences(ours: Any, want: list[np.ndarray]) -> dict[str, float]:
    """Norm of the difference of each result, relative to the norm of what it should be."""
    names = ("output", "query", "key", "value", "bias")
    pairs = zip(names, ours, want, strict=False)
    return {name: float(np.linalg.norm(np.asarray(x, np.float32) - y) / np.linalg.norm(y)) for name, x, y in pairs}


def speeds(case: Attention, forward: float, whole: float) -> dict[str, float]:
    """Milliseconds and TFLOP/s; a causal call is counted as half, and a window or documents not at all."""
    flops = 4 * case.batch * case.heads * case.queries * case.keys * case.width / (2 if case.causal else 1)
    values = {"forward_ms": 1e3 * forward, "forward_tflops": flops / forward / 1e12}
    if case.trained:
        backward = max(whole - forward, 1e-9)
        values |= {"backward_ms": 1e3 * backward, "backward_tflops": 2.5 * flops / backward / 1e12}
    return values


def verdict(case: Attention, errors: dict[str, float], speed: dict[str, float], *, finite: bool) -> str:
    """One word for a call that ran."""
    if not finite or (not case.negative and max(errors.values()) > LARGEST_ERROR[case.dtype]):
        return "wrong"
    fast = speed["forward_tflops"] >= case.least[0] and speed.get("backward_tflops", 1e9) >= case.least[1]
    return "right" if fast else "slow"


def change(case: Attention, result: str, row: CallClass) -> str:
    """What a verdict changes in the code."""
    if result == "failed":
        return "not known: read the error"
    where = f"row {row.name!r}, {'in' if row in AVOIDED else 'into'} AVOIDED of jaxllm/ops/cudnn.py"
    if result == "slow":
        return f"compare with {case.compare or 'model.attention=chunked'}; {where} if that is faster"
    if row in AVOIDED:
        return f"{where}: not for this cuDNN" if result == "right" else "none: the row is avoided"
    return "none" if result == "right" else f"{where}, so that it takes blocks"


def timed(program: Callable[..., Any], *args: Any) -> float:
    """Seconds of a run: the least mean of six groups of 20 ms. Threads that compile meanwhile slow some groups."""
    for _ in range(2):
        start = time.perf_counter()
        jax.block_until_ready(program(*args))
    count = int(np.clip(0.02 / (time.perf_counter() - start), 1, 100))
    best = math.inf
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(count):
            out = program(*args)
        jax.block_until_ready(out)
        best = min(best, (time.perf_counter() - start) / count)
    return best


def failed(error: Exception) -> dict[str, Any]:
    """What is reported of a call, or any other fact, that did not run."""
    verdict = "refused" if refused(error) else "failed"
    return {"verdict": verdict, "error": f"{type(error).__name__}: {error}"[:600]}
