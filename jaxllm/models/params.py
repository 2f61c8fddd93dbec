"""Parameters of a model of any family: random, as shapes, counted, compared."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxllm.config import ModelConfig
from jaxllm.models.checks import listed

# A family's module: attributes `config`, `dtype` and `islands`; called with tokens, or with encoder and decoder tokens,
# for logits; methods `head` for the output matrix [V, D] and `logits` for hidden states.
Model = nn.Module


def init_params(model: Model, key: jax.Array) -> dict[str, Any]:
    """Random parameters in float32, a plain dict; `key` is a `jax.random.key(seed)`.

    Equal models share one compiled program: op-by-op initialisation would cost seconds.

    Raises:
        ValueError: for anything but a model and one key.
    """
    check_model(model)
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    old = dtype == jnp.uint32 and shape == (2,)  # a jax.random.PRNGKey
    if not old and not (typed and shape == ()):
        got = f"{dtype}{list(shape)}; jax.vmap takes several" if typed and shape else repr(key)
        raise ValueError(f"key must be one key, e.g. jax.random.key(0), got {got}")
    return _init(model.clone(), key)


@functools.partial(jax.jit, static_argnums=0)
def _init(model: Model, key: jax.Array) -> Any:
    tokens = jnp.zeros((1, 2), jnp.int32)
    inputs = (tokens, tokens) if model.config.encoder_decoder else (tokens,)
    return model.init(key, *inputs)["params"]


def check_model(model: Any) -> None:
    """Raises ValueError for anything that `build` has not made, such as a config."""
    if not (isinstance(model, nn.Module) and isinstance(getattr(model, "config", None), ModelConfig)):
        raise ValueError(f"the first argument must be a model as `build` makes it, got {type(model).__name__}")


def abstract_params(model: Model) -> dict[str, Any]:
    """Shapes and dtypes of the parameters, without allocating them."""
    return _init.eval_shape(model.clone(), jax.eval_shape(lambda: jax.random.key(0)))


def check_params(model: Model, params: Any) -> None:
    """Raises ValueError naming training parameters that are missing, left over or of another shape."""

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
    wrong = [title + listed(sorted(names)) for title, names in groups.items() if names]
    if wrong:
        fix = '; pass variables["params"]' if isinstance(params, Mapping) and set(params) == {"params"} else ""
        raise ValueError(f"the parameters are not those of the model: {'; '.join(wrong)}{fix}")


def count_params(model: Model) -> int:
    """Number of parameters, from shapes alone."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model)))
