"""How a setting is declared, and the one checker of its value.

    steps: Annotated[int, at_least(1), "optimizer steps"] = 1000

declares a setting: its type, its bounds, its meaning and its default. `settings` turns a class of such lines into
a frozen dataclass whose constructor checks every value, from a file or from Python. Modules of such classes do
without `from __future__ import annotations`: at import, Python would compile the annotations again from text.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import operator
import os
import typing
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, get_args, get_origin

T = typing.TypeVar("T")


class Bound(NamedTuple):
    """A condition on a number: `compare(number, limit)`; errors contain the words."""

    words: str
    compare: Callable[[Any, Any], bool]
    limit: float


above = functools.partial(Bound, "above", operator.gt)
at_least = functools.partial(Bound, "at least", operator.ge)
below = functools.partial(Bound, "below", operator.lt)
at_most = functools.partial(Bound, "at most", operator.le)
positive = above(0)


class Setting(NamedTuple):
    """One declaration."""

    kind: Any  # the type
    bounds: tuple[Bound, ...]
    meaning: str  # one sentence
    default: Any  # `dataclasses.MISSING` for a required setting


class SettingError(ValueError):
    """Wrong values of settings: `problems` maps each name to what it must be and what was found."""

    def __init__(self, owner: str, problems: dict[str, str]) -> None:
        super().__init__(owner, problems)
        self.owner, self.problems = owner, problems

    def __str__(self) -> str:
        return "; ".join(f"{self.owner}.{name} {problem}" for name, problem in self.problems.items())


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
def settings(cls: type[T]) -> type[T]:
    """Makes a frozen dataclass of a class of declarations.

    Its constructor converts and checks each setting and raises SettingError for a wrong type or a broken bound.
    Then the `__post_init__` of the class checks how settings fit together. The meanings become the docstring's
    `Attributes:`.

    >>> @settings
    ... class Walk:
    ...     steps: Annotated[int, at_least(1), "steps of the walk"] = 10
    >>> Walk(steps=0)
    Traceback (most recent call last):
    jaxllm.config.setting.SettingError: Walk.steps must be at least 1, got 0
    """
    made: Any = cls
    text, fit_together = inspect.cleandoc(cls.__doc__ or ""), getattr(made, "__post_init__", None)

    def check(self: Any) -> None:
        _check_each(self)
        if fit_together is not None:
            fit_together(self)

    made.__post_init__ = check
    made = dataclasses.dataclass(frozen=True, kw_only=True)(made)
    declared = settings_of(made)
    made.__init__.__annotations__ = {name: item.kind for name, item in declared.items()} | {"return": None}
    lines = (f"    {name}: {item.meaning}." for name, item in declared.items())
    made.__doc__ = "\n".join([text, "", "Attributes:", *lines, ""])
    return made


@functools.cache
def settings_of(cls: type) -> dict[str, Setting]:
    """The declarations of a class, by name."""
    hints, found = typing.get_type_hints(cls, include_extras=True), {}
    for item in dataclasses.fields(cls):
        hint = hints[item.name]
        kind, *about = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        bounds = tuple(each for each in about if isinstance(each, Bound))
        meaning = "".join(each for each in about if isinstance(each, str))
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        found[item.name] = Setting(kind, bounds, meaning, default)
    return found


def require(condition: bool, message: str) -> None:
    """Raises ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def type_name(kind: Any) -> str:
    """The type in the words of a config file: int|null, scan|unroll, list of float."""
    origin, options = get_origin(kind), get_args(kind)
    if origin in (typing.Union, UnionType):
        return "|".join(map(type_name, options))
    if origin is typing.Literal:
        return "|".join(map(str, options))
    if origin in (tuple, list):
        return f"list of {type_name(options[0])}"
    if origin is dict:
        return f"{{{type_name(options[0])}: {type_name(options[1])}}}"
    return "null" if kind is NoneType else getattr(kind, "__name__", str(kind))


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the known name that is closest, or all of them."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"


def _check_each(owner: Any) -> None:
    problems = {}
    for name, item in settings_of(type(owner)).items():
        try:
            value = _convert(item.kind, getattr(owner, name))
            _check_bounds(item, value)
        except (ValueError, OverflowError) as error:
            problems[name] = str(error)
        else:
            object.__setattr__(owner, name, value)
    if problems:
        raise SettingError(type(owner).__name__, problems)


def _check_bounds(item: Setting, value: Any) -> None:
    holds = value is None or all(bound.compare(value, bound.limit) for bound in item.bounds)
    words = " and ".join(f"{bound.words} {bound.limit}" for bound in item.bounds)
    require(holds, f"must be {words}{' or null' if NoneType in get_args(item.kind) else ''}, got {value!r}")


def _convert(kind: Any, value: Any, of: str = "") -> Any:
    """The value in its declared type, such as an int as float; errors begin with `of`, its place in a mapping."""
    origin, options = get_origin(kind), get_args(kind)
    if origin in (typing.Union, UnionType):
        return _convert_to_any(kind, value)
    if origin is typing.Literal:
        require(isinstance(value, str) and value in options, f"{of}must be one of {', '.join(options)}, got {value!r}")
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(options[0], item) for item in value)
    if origin is dict and isinstance(value, dict):
        return {_convert(options[0], key): _convert(options[1], item, f"of {key!r} ") for key, item in value.items()}
    if getattr(value, "shape", None) == () and getattr(value.dtype, "kind", "") in tuple("biuf"):
        value = value.item()  # a number of NumPy or jax
    accepted, converted = _PLAIN.get(kind, (origin or kind, lambda same: same))
    fits = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))  # to Python a bool is an int
    require(fits, f"{of}must be of type {type_name(kind)}, got {value!r}")
    require(kind is not float or math.isfinite(value), f"{of}must be finite, got {value!r}")
    return converted(value)


def _convert_to_any(kind: Any, value: Any) -> Any:
    for option in get_args(kind):
        try:
            return _convert(option, value)
        except ValueError:
            continue
    raise ValueError(f"must be of type {type_name(kind)}, got {value!r}")


# What counts as a value of a type, and how it becomes one: paths are text.
_PLAIN: dict[Any, tuple[Any, Callable[[Any], Any]]] = {
    int: (Integral, int),
    float: (Real, float),
    str: ((str, os.PathLike), os.fspath),
}
