"""What a loss scale adds to the compiled update: unscaling, one look at each gradient, and on a CPU known copies."""

from __future__ import annotations

import collections
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxllm.training.precision import dynamic_loss_scale

SHAPES = [(64, 96), (80, 48)]
PARAMS = {f"w{i}": jax.ShapeDtypeStruct(shape, jnp.float32) for i, shape in enumerate(SHAPES)}


def compiled_update(rule: Any) -> str:
    """The optimized program of a donated optimizer step, without the bodies of its fusions."""
    rule = optax.with_extra_args_support(rule)

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = rule.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(rule.init, PARAMS)
    text = jax.jit(step, donate_argnums=(0, 1)).lower(PARAMS, state, PARAMS).compile().as_text()
    return text[text.index("ENTRY") :]


def counts(text: str, operation: str) -> list[int]:
    """How often an operation gives an array of each of `SHAPES`."""
    found = collections.Counter(re.findall(rf"\[(\d+,\d+)\]\S* {operation}\(", text))
    return [found[",".join(map(str, shape))] for shape in SHAPES]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts fusions as XLA:CPU makes them")
def test_it_adds_unscaling_and_one_look_and_a_cpu_one_copy_of_each_moment() -> None:
    """The skip itself is inside fusions that exist anyway; docs/mixed_precision.md explains the copies."""
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    plain, scaled = compiled_update(inner), compiled_update(dynamic_loss_scale(inner))
    more = [b - a for a, b in zip(counts(plain, "fusion"), counts(scaled, "fusion"), strict=True)]
    assert 1 <= min(more) and max(more) <= 2
    for operation in ("select", "multiply", "divide", "add", "is-finite"):
        assert counts(scaled, operation) == [0, 0], operation
    assert counts(plain, "copy") == [0, 0] and max(counts(scaled, "copy")) <= 2
