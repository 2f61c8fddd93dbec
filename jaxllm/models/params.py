"""Parameters of a model of any family: made at random, described, counted, compared."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxllm.config import ModelConfig

# A family's module: attributes `config`, `dtype` and `islands`; called with tokens, or with encoder and decoder tokens,
# for logits; methods `head` for the output matrix [V, D] and `logits` for hidden states.
Model = nn.Module


def init_params(model: Model, key: jax.Array) -> dict[str, Any]:
    """Random parameters in float32, a plain dict; `key` is a `jax.random.key(seed)`.

    Jitted, because op-by-op initialisation costs seconds; models that are equal share what was compiled.

    Raises:
        ValueError: for what is no model, or not one key.
    """
    check_model(model)
    _check_key(key)
    return _init(model.clone(), key)


@functools.partial(jax.jit, static_argnums=0)
def _init(model: Model, key: jax.Array) -> Any:
    return model.init(key, *_inputs(model))["params"]


def check_model(model: Any) -> None:
    """Raises ValueError for what `build` has not made, such as a config."""
    if not (isinstance(model, nn.Module) and isinstance(getattr(model, "config", None), ModelConfig)):
        raise ValueError(f"the first argument must be a model as `build` makes it, got {type(model).__name__}")


def _check_key(key: Any) -> None:
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    old = dtype == jnp.uint32 and shape == (2,)  # a jax.random.PRNGKey
    if not old and not (typed and shape == ()):
        got = f"{dtype}{list(shape)}; jax.vmap takes several" if typed and shape else repr(key)
        raise ValueError(f"key must be one key, e.g. jax.random.key(0), got {got}")


def abstract_params(model: Model) -> dict[str, Any]:
    """Shapes and dtypes of the parameters, without allocating them."""
    return _init.eval_shape(model.clone(), jax.eval_shape(lambda: jax.random.key(0)))


def _inputs(model: Model) -> tuple[jax.Array, ...]:
    tokens = jnp.zeros((1, 2), jnp.int32)
    return (tokens, tokens) if model.config.encoder_decoder else (tokens,)


def check_params(model: Model, params: Any) -> None:
    """Compares training parameters with the model's: their names and shapes.

    Raises:
        ValueError: naming those that are missing, left over or of another shape.
    """

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): jnp.shape(leaf) for path, leaf in leaves}

    want, found = shapes(abstract_params(model)), shapes(params)
    common = want.keys() & found.keys()
    groups = {
        "missing: ": want.keys() - found.keys(),
        "unexpected: ": found.keys() - want.keys(),
        "": {f"{name} {list(found[name])}, not {list(want[name])}" for name in common if found[name] != want[name]},
    }
    wrong = [
        title + ", ".join(sorted(names)[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        for title, names in groups.items()
        if names
    ]
    if wrong:
        fix = '; pass variables["params"]' if isinstance(params, Mapping) and set(params) == {"params"} else ""
        raise ValueError(f"the parameters are not those of the model: {'; '.join(wrong)}{fix}")


def count_params(model: Model) -> int:
    """Number of parameters, from shapes alone."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model)))
