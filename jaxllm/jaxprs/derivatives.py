"""Derivatives in forward mode for functions whose operations have rules for the backward pass only.

The models' matmuls, norms, attention and loss have rules for the backward pass (`jax.custom_vjp`), so that they round
once and keep little. jax refuses to differentiate these forward. Here each runs as the operations inside it, and jax
differentiates those either way.
"""

import functools
from collections.abc import Callable
from typing import Any

from jaxllm.jaxprs.interpret import Visitor, bind, run
from jaxllm.jaxprs.programs import programs


def forward_mode(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of trees of arrays for `jax.jvp`, `jacfwd`, `linearize`, `hessian`, and `jvp` of `grad`.

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
