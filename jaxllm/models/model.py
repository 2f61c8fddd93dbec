"""A model of any family as its callers see it: its parameters, checks of what a call is given, the work of a step.

Misuse that would silently compute something else is an error with its fix.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import ApplyScopeInvalidVariablesTypeError
from jaxtyping import Array, Float

from jaxllm.config import ModelConfig

# A family's module: attributes `config`, `dtype` and `islands`; called with tokens, or with encoder and decoder tokens,
# for logits; methods `head` for the output matrix [V, D] and `logits` for hidden states.
Model = nn.Module


class FamilyModule(nn.Module):
    """A Flax module with a head; `apply` refuses parameters in place of variables and names the fix."""

    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """X @ head.T, accumulated and returned in float32."""
        return jnp.einsum("btd,vd->btv", x, self.head(), preferred_element_type=jnp.float32)

    def head(self) -> Float[Array, "V D"]:
        """The output head in the compute dtype: its own, or the embedding when tied."""
        return jnp.asarray(self.embed if self.config.tie_embeddings else self.lm_head, self.dtype)

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """As Flax's; ValueError for parameters that are not in {"params": ...}."""
        try:
            return super().apply(variables, *args, **kwargs)
        except ApplyScopeInvalidVariablesTypeError:
            if "params" in variables:
                raise
            fix = 'write model.apply({"params": params}, ...)'
            raise ValueError(f"apply needs variables, got parameters ({listed(sorted(variables))}); {fix}") from None


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
    if not isinstance(params, Mapping):
        raise ValueError(f"parameters must be a dict as init_params and load_run give, got {type(params).__name__}")

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


def refuse(module: nn.Module, *names: str) -> None:
    """Raises ValueError for parameters that the module would leave unread: they are another model's."""
    found = [name for name in names if module.has_variable("params", name)]
    if found:
        raise ValueError(
            f"the parameters hold {', '.join(found)} in {type(module).__name__}, but the model's config does not have "
            "it: use the parameters of the same model"
        )


def check_tokens(tokens: Any, name: str) -> None:
    """Raises ValueError unless tokens are an integer array [B, T], not empty."""
    shape, dtype = getattr(tokens, "shape", None), getattr(tokens, "dtype", None)
    if shape is None or dtype is None:
        raise ValueError(f"{name} must be an integer array [B, T], got {type(tokens).__name__}; use jnp.asarray")
    if len(shape) != 2 or 0 in shape or not jnp.issubdtype(dtype, jnp.integer):
        fix = f"; a single row is {name}[None]" if len(shape) == 1 else ""
        raise ValueError(f"{name} must be an integer array [B, T], got {dtype}{list(shape)}{fix}")


def listed(names: Sequence[str], most: int = 8) -> str:
    """The first names and how many more there are, for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def check_shape(value: Any, name: str, *shapes: tuple[int, ...]) -> None:
    """Raises ValueError unless the value is None or has one of the shapes."""
    if value is not None and value.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise ValueError(f"{name} must be of shape {wanted}, got {list(value.shape)}")


class Flops(NamedTuple):
    """Floating-point operations of one training step: the algorithm's work, without recomputation and embedding."""

    causal: float  # attention counts only visible pairs; publish this one
    full: float  # attention counts all pairs, as in PaLM and most tables
    weights: float  # without attention, 6 N per token
