"""Derivatives in forward mode, which rules written for the backward pass do not have.

The models' products, norms, attention and loss come with rules of their own (`jax.custom_vjp`): they round once and
keep little for the backward pass, and jax refuses to differentiate them forward. Here each runs as the operations that
it is made of, which jax differentiates either way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from jaxllm.jaxprs.interpret import Place, Record, Visitor, bind, run
from jaxllm.jaxprs.programs import programs


def forward_mode(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of trees of arrays for `jax.jvp`, `jacfwd`, `linearize`, `hessian`, and `jvp` of `grad`.

    >>> import jax, jaxllm
    >>> config = jaxllm.LlamaConfig(vocab_size=16, d_model=8, d_ff=16, num_layers=1, num_heads=2)
    >>> model = jaxllm.build(config)
    >>> params = jaxllm.init_params(model, jax.random.key(0))
    >>> def score(params):
    ...     return model.apply({"params": params}, jax.numpy.array([[1, 2, 3]]))[0, -1, 7]
    >>> direction = jax.grad(score)(params)
    >>> _, curvature = jax.jvp(jax.grad(forward_mode(score)), (params,), (direction,))  # Hessian times direction
    >>> jax.tree.structure(curvature) == jax.tree.structure(params)
    True

    In float32 derivatives are the models' own up to rounding; in 16 bits they are rounded more often. A backward pass
    through it keeps what jax keeps by itself, such as attention's weights. A `custom_vjp` of your own is left out as
    well, a `custom_jvp` stays. What is in a condition, a `while` loop or a `shard_map` stays as it is, and so does a
    fused attention of a GPU.
    """

    @functools.wraps(function)
    def plain(*args: Any, **kwargs: Any) -> Any:
        return run(function, args, kwargs, Visitor(_holds_rule, _as_it_stands))[0]

    return plain


def _holds_rule(eqn: Any) -> bool:
    name = eqn.primitive.name
    if name == "custom_jvp_call":  # goes forward by its own rule, whatever is inside
        return False
    return name == "custom_vjp_call" or any(_holds_rule(inner) for body in programs(eqn) for inner in body.eqns)


def _as_it_stands(eqn: Any, inputs: list[Any], place: Place) -> tuple[list[Any], list[Record]]:
    del place
    return bind(eqn, inputs), []
