"""The calls of cuDNN's attention by class, and which classes are avoided: one table, so that a finding is one row.

`benchmarks/gpu/probe.py` compares a call of every class with float32 on a GPU and names the row that a bad answer
changes. cuDNN's limits are in `jaxllm.ops.fused_attention.obstacle`. `refused` recognises what cuDNN refuses in spite
of both, by the error of the lowering or compilation.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax


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
    """Calls that do not go to cuDNN but to blocks in plain JAX, or that may have to."""

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


def calls_in(program: str) -> list[str]:
    """The distinct cuDNN attentions of a lowered program (StableHLO), each with the shapes of query and key."""
    found = re.findall(r"@__cudnn\$(fmha\w+)\(.*: \(tensor<(\w+)>, tensor<(\w+)>", program)
    return [f"{name} [{query}] [{key}]" for name, query, key in dict.fromkeys(found)]
