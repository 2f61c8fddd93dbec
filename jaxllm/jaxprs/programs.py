"""Reading jaxprs: the programs inside an operation, and the Flax modules around it, from JAX's name stacks.

`jaxllm.jaxprs.interpret` reads values with it, `jaxllm.study.ledger` dtypes.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

# Operations that run a program once, on their own inputs.
REMAT = {"checkpoint", "remat2"}
INLINED = {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", *REMAT}

# Marks the border of a loop in a list of name stacks.
LOOP = "<loop>"

_WRAPPER = re.compile(r"(?:transpose|jvp|vmap|remat|checkpoint|rematted_computation)\(|\)")


def inlined(eqn: Any) -> tuple[Any, Sequence[Any]]:
    """The program of an operation in `INLINED`, and its constants."""
    body = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return getattr(body, "jaxpr", body), getattr(body, "consts", ())


def programs(eqn: Any) -> Iterator[Any]:
    """Every program inside an operation: of a call, a loop, the branches of a condition, a kernel."""
    for value in eqn.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            body = getattr(part, "jaxpr", part)
            if hasattr(body, "eqns"):
                yield body


def is_backward(stacks: Sequence[str]) -> bool:
    """Whether an operation is part of the backward pass."""
    return any("transpose(" in stack for stack in stacks)


def label(stacks: Sequence[str], index: Sequence[int] | None = None) -> tuple[str, str]:
    """Outermost numbered module (or the first) and the path of modules, from `Place.stacks`.

    `index` has the iteration of each loop. It numbers the first module inside: LlamaLayer[2]/down_proj. So does the
    number of a layer outside loops. None numbers nothing.
    """
    parts: list[str] = []
    steps, pending = iter(index or ()), ""
    for stack in stacks:
        if stack == LOOP:
            step = next(steps, None)
            pending = "" if step is None else f"[{step}]"
            continue
        for token in _WRAPPER.sub("", stack).split("/"):
            if token.isdigit() and index is not None:
                pending = f"[{token}]"
            # Methods (Llama.hidden), einsum equations and repetitions add nothing.
            if not token.isidentifier() or (parts and parts[-1].split("[")[0] == token):
                continue
            parts.append(token + pending)
            pending = ""
    block = next((part for part in parts if "[" in part), parts[0] if parts else "")
    return block, "/".join(parts)


def numbers(stacks: Sequence[str]) -> list[int]:
    """Numbers of layers outside loops."""
    return [int(token) for stack in stacks for token in _WRAPPER.sub("", stack).split("/") if token.isdigit()]
