"""Values inside a function by name: `capture` returns them, `edit` replaces them in place, `sites` lists them.

A hook point is a value that a layer marks with `jax.ad_checkpoint.checkpoint_name`; docs/study.md lists those of the
models. Its path follows the parameter tree, such as decoder/layers/cross_attention/query, without the number of the
layer. All three are transformations of functions: they compose with `jax.grad`, jit, vmap and each other.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxllm.jaxprs.interpret import LOOP, Place, Record, Visitor, bind, label, numbers, programs, run

Edit = Callable[[Array, Any], Any]


def capture(function: Callable[..., Any], *names: str) -> Callable[..., tuple[Any, dict[str, Array]]]:
    """A function that returns (function's own result, {path: values of all layers [L, ...]}).

    >>> import jaxllm
    >>> model = jaxllm.build(jaxllm.LlamaConfig(vocab_size=16, d_model=8, d_ff=16, num_layers=2, num_heads=2))
    >>> params = jaxllm.init_params(model, jax.random.key(0))
    >>> def forward(params, tokens):
    ...     return model.apply({"params": params}, tokens)
    >>> logits, seen = jax.jit(capture(forward, "after_mlp", "heads"))(params, jnp.array([[1, 2, 3]]))
    >>> {path: value.shape for path, value in seen.items()}  # [L, B, T, N, H] and [L, B, T, D]
    {'layers/after_mlp': (2, 1, 3, 8), 'layers/heads': (2, 1, 3, 2, 4)}

    Args:
        function: any function of arrays that runs a model once.
        names: paths, or their ends: `query` is every query, `cross_attention/query` those of cross-attention. Without
            names every hook point is captured, which can take much memory.

    Raises:
        ValueError: when called, for a name that is not a hook point of the function, or a hook point in the backward
            pass, in the caller's loop or condition, or in a function with its own derivatives: capture inside it.
    """

    @functools.wraps(function)
    def captured(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, Array]]:
        wanted = _HookPoints(names)

        def visit(eqn: Any, inputs: list[Any], place: Place) -> tuple[list[Any], list[Record]]:
            path, _ = wanted.reach(eqn, place)
            outputs = bind(eqn, inputs)
            taken = path and (not names or any(_matches(path, name) for name in names))
            return outputs, [((path, bool(place.steps)), outputs[0])] if taken else []

        out, records = run(function, args, kwargs, Visitor(_enters, visit))
        wanted.check()
        return out, _joined(records)

    return captured


def edit(function: Callable[..., Any], edits: Mapping[str, Edit], *, strict: bool = True) -> Callable[..., Any]:
    """The function with values replaced at its hook points.

    >>> import jaxllm
    >>> model = jaxllm.build(jaxllm.LlamaConfig(vocab_size=16, d_model=8, d_ff=16, num_layers=2, num_heads=2))
    >>> params = jaxllm.init_params(model, jax.random.key(0))
    >>> def forward(params, tokens):
    ...     return model.apply({"params": params}, tokens)
    >>> def without_a_head(heads, layer):  # head 0 of layer 1
    ...     return jnp.where(layer == 1, heads.at[:, :, 0].set(0), heads)
    >>> edited, tokens = edit(forward, {"heads": without_a_head}), jnp.array([[1, 2, 3]])
    >>> edited(params, tokens).shape, bool(jnp.all(edited(params, tokens) == forward(params, tokens)))
    ((1, 3, 16), False)

    Args:
        function: any function of arrays that runs a model once.
        edits: by path or its end (as in `capture`), functions of (value, layer) to a new value of the same shape,
            which is cast to the old dtype. `layer` is an integer, traced in a loop over layers: choose by
            `jnp.where`. The functions may close over traced values, to differentiate or vmap over them.
        strict: whether a name that is not a hook point of the function is an error.

    Raises:
        ValueError: at once for an edit that does not take (value, layer); when called, as `capture`, for a new value
            of another shape, and for an edit that needs a traced number in Python.
    """
    check_edits(edits)

    @functools.wraps(function)
    def edited(*args: Any, **kwargs: Any) -> Any:
        wanted = _HookPoints(edits)

        def visit(eqn: Any, inputs: list[Any], place: Place) -> tuple[list[Any], list[Record]]:
            path, layer = wanted.reach(eqn, place)
            for name, change in edits.items():
                if path and _matches(path, name):
                    inputs = [_changed(change, path, inputs[0], layer)]
            return bind(eqn, inputs), []

        try:
            out, _ = run(function, args, kwargs, Visitor(_enters, visit))
        except _EditError as caught:
            return jax.eval_shape(functools.partial(_raise, *caught.args))  # jax leaves its frames out of the traceback
        if strict:
            wanted.check()
        return out

    return edited


def check_edits(edits: Mapping[str, Edit]) -> None:
    """Raises ValueError for an edit that does not take (value, layer)."""
    for name, change in edits.items():
        try:
            inspect.signature(change).bind(None, 0)
        except TypeError as error:
            form = "must be a function of (value, layer), e.g. lambda value, layer: 2 * value"
            raise ValueError(f"the edit of {name} {form}; {error}") from None
        except ValueError:
            continue  # a builtin may have no signature


class _EditError(Exception):
    """Holds the error of an edit on its way out of the interpreter, which would add its frames to the traceback."""


def _raise(error: Exception, cause: BaseException | None) -> NoReturn:
    raise error from cause


def sites(function: Callable[..., Any]) -> Callable[..., dict[str, jax.ShapeDtypeStruct]]:
    """A function of the same arguments that returns {path: shape and dtype over all layers}, uncomputed.

    >>> import jaxllm
    >>> model = jaxllm.build(jaxllm.LlamaConfig(vocab_size=16, d_model=8, d_ff=16, num_layers=2, num_heads=2))
    >>> params = jaxllm.init_params(model, jax.random.key(0))
    >>> found = sites(lambda tokens: model.apply({"params": params}, tokens))(jnp.array([[1, 2, 3]]))
    >>> found["layers/query"].shape, "layers/mlp_output" in found
    ((2, 1, 3, 2, 4), True)
    """

    @functools.wraps(function)
    def listed(*args: Any, **kwargs: Any) -> dict[str, jax.ShapeDtypeStruct]:
        return jax.eval_shape(capture(function), *args, **kwargs)[1]

    return listed


class _HookPoints:
    """The hook points that a run of the function has reached."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = list(names)
        self._seen: dict[str, None] = {}

    def reach(self, eqn: Any, place: Place) -> tuple[str, Any]:
        """Path and layer of a hook point; an empty path for any other operation."""
        if eqn.primitive.name != "name":
            if _holds_hook_point(eqn):
                raise ValueError(f"a hook point is inside {eqn.primitive.name}: capture or edit inside it")
            return "", None
        path = _path(place, eqn.params["name"])
        self._seen[path] = None
        # The caller's scopes may be numbered too; the layer's is the innermost.
        return path, place.steps[0] if place.steps else [0, *numbers(place.stacks)][-1]

    def check(self) -> None:
        """Raises ValueError for a name that matches no path."""
        for name in self._names:
            if not any(_matches(path, name) for path in self._seen):
                known = ", ".join(self._seen) or "none: it runs no model of this library"
                hint = " (build the model with `attention: reference`)" if "attention_weights" in name else ""
                raise ValueError(f"{name!r} is not a hook point of the function{hint}; known: {known}")


def _enters(eqn: Any) -> bool:
    # A function with custom derivatives would lose them if its operations ran one by one.
    return _holds_hook_point(eqn) and not eqn.primitive.name.startswith("custom_")


def _holds_hook_point(eqn: Any) -> bool:
    inside = (inner for body in programs(eqn) for inner in body.eqns)
    return any(inner.primitive.name == "name" or _holds_hook_point(inner) for inner in inside)


def _matches(path: str, name: str) -> bool:
    return f"/{path}".endswith(f"/{name}")


def _path(place: Place, name: str) -> str:
    """Such as decoder/layers/cross_attention/query: names of modules, with `layers` for a layer class."""
    if any("jvp(" in stack or "transpose(" in stack for stack in place.stacks):
        raise ValueError(f"hook point {name} is in a gradient: differentiate the captured or edited function")
    if place.steps:
        inside = place.stacks[place.stacks.index(LOOP) + 1 :]
        if LOOP in inside or numbers(inside):
            raise ValueError(f"hook point {name} is in a loop not over layers: capture or edit inside it")
    # A module without a parent has its class as name: the model itself, and a layer taken out of its stack.
    modules = ["layers" if part.endswith("Layer") else part for part in label(place.stacks)[1].split("/")]
    return "/".join([module for module in modules if module and not module[:1].isupper()] + [name])


def _joined(records: list[Record]) -> dict[str, Array]:
    """Values of all layers by path; those from a loop are stacked already."""
    parts: dict[str, list[Array]] = {}
    for (path, looped), value in records:
        parts.setdefault(path, []).append(value if looped else value[None])
    return {path: jnp.concatenate(values) for path, values in parts.items()}


# What jax raises for a traced number in `if`, as an index of a list, in NumPy, or as a mask.
_NEEDS_A_NUMBER = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


def _changed(change: Edit, path: str, value: Array, layer: Any) -> Array:
    try:
        new = change(value, layer)
        if new is None:
            raise ValueError(f"the edit of {path} returns None: it must return the new value")
        new = jnp.asarray(new)
        if new.shape != value.shape:
            raise ValueError(f"the edit of {path} must keep the shape {list(value.shape)}, got {list(new.shape)}")
        return new.astype(value.dtype)
    except _NEEDS_A_NUMBER as error:
        fix = "choose by jnp.where(layer == 1, new, value), and compute by jax.numpy alone"
        raise _EditError(ValueError(f"the edit of {path} needs a traced number in Python: {fix}"), error) from None
    except Exception as error:
        raise _EditError(error, error.__cause__) from None
