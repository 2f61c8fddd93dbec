"""Reads and runs a function's jaxpr; a visitor sees every operation and may record and replace its results.

The function itself needs no hooks and stays as fast as it is. A loop over layers stays a loop: values recorded inside
have one more axis. JAX's name stacks tell the Flax modules around an operation. `hooks` and `observe` in this package
have the visitors; that of `forward_mode` is here.
"""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

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


FORWARD, REVERSED = "loop", "reversed loop"


class Place(NamedTuple):
    """The position of an operation in the program, from the outside in."""

    path: tuple[int | str, ...] = ()  # index in each program, FORWARD or REVERSED for each loop
    stacks: tuple[str, ...] = ()  # name stacks, with `LOOP` at each border of a loop
    steps: tuple[jax.Array, ...] = ()  # iteration of each loop, as traced integers


Record = tuple[Any, jax.Array]  # a label and its value; a loop stacks the values on a new leading axis


class Visitor(NamedTuple):
    """Two functions of an operation: whether to enter the program that it runs, and how to run it otherwise.

    `visit` returns the results and the records of the operation. One that is not entered keeps its own derivatives.
    """

    enters: Callable[[Any], bool]
    visit: Callable[[Any, list[Any], Place], tuple[list[Any], list[Record]]]


def bind(eqn: Any, inputs: Sequence[Any]) -> list[Any]:
    """Results of an operation, unchanged."""
    ready = eqn.primitive.get_bind_params(eqn.params)
    # jax 0.12 returns no functions: they are in the parameters there.
    functions, params = ready if isinstance(ready, tuple) else ((), ready)
    with eqn.ctx.manager:
        result = eqn.primitive.bind(*functions, *inputs, **params)
    return list(result) if eqn.primitive.multiple_results else [result]


def run(function: Callable[..., Any], args: Any, kwargs: Any, visitor: Visitor) -> tuple[Any, list[Record]]:
    """The function's result, and all records in the order of execution."""
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*args, **kwargs)
    outputs, records = interpret(closed.jaxpr, closed.consts, jax.tree.leaves((args, kwargs)), visitor)
    # Constants and arguments that are results may not be arrays of JAX.
    return jax.tree.unflatten(jax.tree.structure(shape), map(jnp.asarray, outputs)), records


def interpret(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], visitor: Visitor, place: Place | None = None
) -> tuple[list[Any], list[Record]]:
    """Outputs of the jaxpr and all records, in the order of execution."""
    place = place or Place()
    values: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))
    records: list[Record] = []
    for position, eqn in enumerate(jaxpr.eqns):
        inputs = [atom.val if hasattr(atom, "val") else values[atom] for atom in eqn.invars]
        stack = str(eqn.source_info.name_stack)
        here = place._replace(path=(*place.path, position), stacks=(*place.stacks, stack))
        # The same name stack as before, so that the result can be interpreted again.
        with jax.named_scope(stack):
            outputs, inner = _run(eqn, inputs, visitor, here)
        values.update(zip(eqn.outvars, outputs, strict=True))
        records.extend(inner)
    return [atom.val if hasattr(atom, "val") else values[atom] for atom in jaxpr.outvars], records


def _run(eqn: Any, inputs: list[Any], visitor: Visitor, here: Place) -> tuple[list[Any], list[Record]]:
    name = eqn.primitive.name
    if name == "scan" and visitor.enters(eqn):
        return _run_scan(eqn, inputs, visitor, here)
    if name in REMAT and not eqn.params["differentiated"] and visitor.enters(eqn):
        return _run_remat(eqn, inputs, visitor, here)
    if name in INLINED and visitor.enters(eqn):
        return interpret(*inlined(eqn), inputs, visitor, here)
    return visitor.visit(eqn, inputs, here)


def _run_remat(eqn: Any, inputs: list[Any], visitor: Visitor, here: Place) -> tuple[list[Any], list[Record]]:
    """Runs a rematerialised program so that a gradient still computes it again."""
    labels: list[Any] = []

    def body(inputs: list[Any]) -> tuple[list[Any], list[jax.Array]]:
        outputs, records = interpret(*inlined(eqn), inputs, visitor, here)
        labels[:] = [label for label, _ in records]
        return outputs, [value for _, value in records]

    outputs, recorded = jax.checkpoint(body, policy=eqn.params["policy"])(inputs)
    return outputs, list(zip(labels, recorded, strict=True))


def _run_scan(eqn: Any, inputs: list[Any], visitor: Visitor, here: Place) -> tuple[list[Any], list[Record]]:
    closed, backwards, length = eqn.params["jaxpr"], eqn.params["reverse"], eqn.params["length"]
    # Sliced and stacked arrays have one more axis outside the loop. jax 0.12 has no parameters that count them.
    carried = sum(not stacked for stacked in _stacked(eqn.outvars, closed.jaxpr.outvars))
    constants = len(inputs) - carried - sum(_stacked(eqn.invars, closed.jaxpr.invars))
    consts, start, xs = inputs[:constants], inputs[constants : constants + carried], inputs[constants + carried :]
    path, stacks = (*here.path, REVERSED if backwards else FORWARD), (*here.stacks, LOOP)
    labels: list[Any] = []

    def body(carry: list[Any], x: tuple[Any, list[Any]]) -> tuple[list[Any], tuple[list[Any], list[jax.Array]]]:
        step, slices = x
        inside = Place(path, stacks, (*here.steps, step))
        outputs, records = interpret(closed.jaxpr, closed.consts, [*consts, *carry, *slices], visitor, inside)
        labels[:] = [label for label, _ in records]
        return outputs[:carried], (outputs[carried:], [value for _, value in records])

    steps = jnp.arange(length)
    last, (ys, recorded) = jax.lax.scan(body, start, (steps, xs), length=length, reverse=backwards)
    return [*last, *ys], list(zip(labels, recorded, strict=True))


def _stacked(outside: Sequence[Any], inside: Sequence[Any]) -> list[bool]:
    return [outer.aval.ndim > inner.aval.ndim for outer, inner in zip(outside, inside, strict=True)]


def forward_mode(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of trees of arrays for `jax.jvp`, `jacfwd`, `linearize`, `hessian`, and `jvp` of `grad`.

    The models' matmuls, norms, attention and loss have rules for the backward pass (`jax.custom_vjp`), so that they
    round once and keep little. jax refuses to differentiate these forward. Here each runs as the operations inside it.

    >>> import jax, jaxllm
    >>> model = jaxllm.build(jaxllm.LlamaConfig(vocab_size=16, d_model=8, d_ff=16, num_layers=1, num_heads=2))
    >>> params = jaxllm.init_params(model, jax.random.key(0))
    >>> def score(params):
    ...     return model.apply({"params": params}, jax.numpy.array([[1, 2, 3]]))[0, -1, 7]
    >>> direction = jax.grad(score)(params)
    >>> _, curvature = jax.jvp(jax.grad(forward_mode(score)), (params,), (direction,))  # Hessian times direction
    >>> jax.tree.structure(curvature) == jax.tree.structure(params)
    True

    In float32 the derivatives agree up to rounding; in 16 bits they are rounded more often. A backward pass keeps
    more, such as attention weights. Your `custom_vjp` rules are dropped too; a `custom_jvp` stays. So do conditions,
    `while` loops, `shard_map` and a GPU's fused attention.
    """

    @functools.wraps(function)
    def plain(*args: Any, **kwargs: Any) -> Any:
        return run(function, args, kwargs, Visitor(_holds_rule, lambda eqn, inputs, _: (bind(eqn, inputs), [])))[0]

    return plain


def _holds_rule(eqn: Any) -> bool:
    name = eqn.primitive.name
    if name == "custom_jvp_call":  # has a rule for forward mode
        return False
    return name == "custom_vjp_call" or any(_holds_rule(inner) for body in programs(eqn) for inner in body.eqns)
