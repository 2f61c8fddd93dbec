"""Shared by the structure tests: abstract programs of a run, and counts over jaxprs and lowered text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from benchmarks.gpu.cards import PRETENCE
from jaxllm.config import RunConfig
from jaxllm.jaxprs.interpret import programs
from jaxllm.training.program import program_of


def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this process choose and lower what a Hopper GPU with cuDNN would get."""
    for name, value in PRETENCE.items():
        monkeypatch.setattr(name, value)


def traced_train_step(config: RunConfig) -> Any:
    """The train step of a run on abstract arguments; nothing is allocated."""
    program = program_of(config)
    return jax.jit(program.train_step, donate_argnums=0).trace(program.abstract_state(), program.abstract_batch())


def equations(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """All equations with how often they run; loops of unknown length and branches are refused."""
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, list(programs(equation))
        yield equation, times
        if inner and name in ("while", "cond"):
            raise ValueError(f"{name} holds a program that runs an unknown number of times")
        for part in inner:
            yield from equations(part, times * equation.params.get("length", 1) if name == "scan" else times)


def dot_flops(jaxpr: Any) -> int:
    """Multiplications and additions of all matmuls."""
    total = 0
    for equation, times in equations(jaxpr):
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * times * math.prod(left[i] for i in contracted) * equation.outvars[0].aval.size
    return total
