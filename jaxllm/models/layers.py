"""What both families are built from: modules that hold parameters, and the loop over a stack of equal layers.

Parameters of all layers of a stack are one tree with a leading axis L, whichever way the loop is compiled: `scan`
compiles a layer once, `unroll` compiles them all and lets XLA fuse across them. The tree is a plain dict that a
layer's `apply` takes slice by slice; prefill and decoding rearrange the same tree and have layer functions of their own
(`llama_decode`, `t5_decode`). Out of scope: mathematics (`jaxllm.ops`), families, caches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxllm.ops import norms
from jaxllm.ops.linear import biased_linear, linear

Params = dict[str, Any]


class Islands(NamedTuple):
    """Dtypes of what a model does not compute in its compute dtype; None is the default.

    Below float32 an island takes sums inside it along, in the backward pass most of all: the precision ledger shows
    which. Decoding (`llama_decode`, `t5_decode`) keeps the defaults.

    Attributes:
        norms: squares, root and quotient of RMSNorm; float32.
        softmax: scores after their product, and weights before theirs; float32.
        relative_bias: T5's bias from its table on; float32 until it is laid out, then the compute dtype.
        mlp_output: what T5's MLP gives to the residual stream; the compute dtype, but float32 under float16.
        residual: the stream, where layers add up; the compute dtype, but float32 in a float16 T5. A run on a GPU with
            bfloat16 sets it to that (`jaxllm.run.folder.settle_residual`).
        logits: of the training loss, as they are stored; float32. Their exponentials always are.
    """

    norms: Any = None
    softmax: Any = None
    relative_bias: Any = None
    mlp_output: Any = None
    residual: Any = None
    logits: Any = None


DEFAULT_ISLANDS = Islands()

# Of parameters when they are created; left to jax, they would be float64 under jax_enable_x64.
MASTER = jnp.float32


def _in_float32(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """An elementwise function computed in float32 and rounded once, in both passes; kept for the second is x alone.

    Step by step in 16 bits its slope is 2 to 8 times as wrong, and in float16 the cube in GELU is infinite from 41 on,
    its slope NaN from 148 on, which no loss scale mends.
    """

    @jax.custom_vjp
    def low(x: Array) -> Array:
        return function(x.astype(jnp.float32)).astype(x.dtype)

    def backward(x: Array, grad: Array) -> tuple[Array]:
        (slope,) = jax.vjp(function, x.astype(jnp.float32))[1](grad.astype(jnp.float32))
        return (slope.astype(x.dtype),)

    low.defvjp(lambda x: (low(x), x), backward)
    return lambda x: low(x) if x.dtype in (jnp.bfloat16, jnp.float16) else function(x)


def _gelu_tanh(x: Array) -> Array:
    """0.5 x (1 + tanh(u)) as x * sigmoid(2 u): XLA:CPU takes 1.4 times as long for a gated MLP with the tanh."""
    return x * jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": _in_float32(jax.nn.silu),
    "gelu_tanh": _in_float32(_gelu_tanh),
    "gelu": _in_float32(lambda x: jax.nn.gelu(x, approximate=False)),
    "relu": jax.nn.relu,
}

# Saved by remat: elementwise, so that no matmul runs twice and only cheap products are recomputed.
_SAVED = ("query", "key", "value", "heads", "gate", "up", "after_attention", "after_cross_attention")
# Named for `jaxllm.study` alone.
_OTHERS = ("input", "attention_output", "cross_attention_output", "neurons", "mlp_output", "after_mlp")


def apply(module: nn.Module, params: Params, *args: Any, method: str | None = None, **kwargs: Any) -> Any:
    """`module.apply` for modules that hold parameters and nothing else, so that the result is the method's own."""
    return module.apply({"params": params}, *args, method=method, **kwargs)


class Linear(nn.Module):
    """x @ kernel (+ bias); the kernel is [in, out], float32 as a parameter and in x's dtype in the product."""

    inputs: int
    outputs: int
    std: float
    use_bias: bool = False

    def setup(self) -> None:
        """Creates the kernel, and the bias where there is one."""
        self.kernel = self.param("kernel", nn.initializers.normal(self.std), (self.inputs, self.outputs), MASTER)
        if not self.use_bias:
            refuse(self, "bias")
        else:
            self.bias = self.param("bias", nn.initializers.zeros, (self.outputs,), MASTER)

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        """Maps the last axis from `inputs` to `outputs`."""
        kernel = self.kernel.astype(x.dtype)
        return biased_linear(x, kernel, self.bias.astype(x.dtype)) if self.use_bias else linear(x, kernel)


class RMSNorm(nn.Module):
    """Holds the weight of `ops.norms.rms_norm`."""

    features: int
    eps: float
    inside: Any = None  # see `Islands.norms`

    def setup(self) -> None:
        """Creates the weight."""
        self.weight = self.param("weight", nn.initializers.ones, (self.features,), MASTER)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises the last axis."""
        return norms.rms_norm(x, self.weight.astype(x.dtype), eps=self.eps, inside=self.inside)


def refuse(module: nn.Module, *names: str) -> None:
    """Raises ValueError for parameters that the module would leave unread, since they are another model's."""
    found = [name for name in names if module.has_variable("params", name)]
    if found:
        raise ValueError(
            f"the parameters hold {', '.join(found)} in {type(module).__name__}, which the model's config does not "
            f"have: they are another model's"
        )


def check_depth(params: Params, num_layers: int) -> None:
    """Raises ValueError for a stack of another depth, which would run without a word."""
    found = jax.tree.leaves(params)[0].shape[0]
    if found != num_layers:
        raise ValueError(f"the parameters hold {found} layers, the model's config has {num_layers}: use the same model")


def check_tokens(tokens: Any, name: str) -> None:
    """Raises ValueError unless tokens are an integer array [B, T], neither of them 0."""
    shape, dtype = getattr(tokens, "shape", None), getattr(tokens, "dtype", None)
    if shape is None or dtype is None:
        raise ValueError(f"{name} must be an integer array [B, T], got {type(tokens).__name__}; use jnp.asarray")
    if len(shape) != 2 or 0 in shape or not jnp.issubdtype(dtype, jnp.integer):
        fix = f"; a single row is {name}[None]" if len(shape) == 1 else ""
        raise ValueError(f"{name} must be an integer array [B, T], got {dtype}{list(shape)}{fix}")


def check_shape(value: Any, name: str, *shapes: tuple[int, ...]) -> None:
    """Raises ValueError unless the value is None or has one of the shapes."""
    if value is not None and value.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise ValueError(f"{name} must be of shape {wanted}, got {list(value.shape)}")


def embed(table: Float[Array, "V D"], tokens: Int[Array, "B T"], *, dtype: Any) -> Float[Array, "B T D"]:
    """Rows of the table in the compute dtype, NaN for ids outside it; the gradient sums a token's uses in float32."""
    return _lookup(jnp.asarray(table, dtype), tokens)  # parameters may be NumPy's


@jax.custom_vjp
def _lookup(table: Array, tokens: Array) -> Array:
    # Indexing would take the nearest row for a wrong id, or count from the end: answers that nobody can tell are wrong.
    return table.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def _lookup_forward(table: Array, tokens: Array) -> tuple[Array, tuple[Array, Array]]:
    # An empty slice carries the table's shape and dtype without keeping the table.
    return _lookup(table, tokens), (tokens, jnp.empty((table.shape[0], 0), table.dtype))


def _lookup_backward(saved_values: tuple[Array, Array], grad: Array) -> tuple[Array, None]:
    tokens, like = saved_values
    wide = jnp.promote_types(grad.dtype, jnp.float32)
    total = jnp.zeros((like.shape[0], grad.shape[-1]), wide).at[tokens].add(grad.astype(wide))
    return total.astype(like.dtype), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


def site(x: Array, name: str) -> Array:
    """Marks a value by a name, for `jaxllm.study` to find and for `remat: elementwise` to keep; no operation."""
    if name not in (*_SAVED, *_OTHERS):
        raise ValueError(f"{name!r} is no name of a site; known: {', '.join((*_SAVED, *_OTHERS))}")
    return checkpoint_name(x, name)


def init_stack(key: Array, init_layer: Callable[[Array], Params], num_layers: int) -> Params:
    """Parameters of `num_layers` equal layers, stacked on a new leading axis."""
    return jax.vmap(init_layer)(jax.random.split(key, num_layers))


def unstack(params: Any) -> list[Any]:
    """The single layers of a stacked tree; `lax.split`, because its transpose is one concatenation."""
    leaves, structure = jax.tree.flatten(params)
    count = leaves[0].shape[0]
    parts = [jax.lax.split(leaf, [1] * count, axis=0) for leaf in leaves]
    return [jax.tree.unflatten(structure, [part[i][0] for part in parts]) for i in range(count)]


def apply_stack(
    layer: Callable[..., Array],
    params: Params,
    x: Float[Array, "B T D"],
    per_layer: Any = None,
    *,
    mode: str,
    remat: str,
) -> Float[Array, "B T D"]:
    """Runs x through `layer(params[i], x, per_layer[i])` for every i.

    Args:
        layer: pure function of one layer's parameters, the residual stream, and what is its own (such as a key).
        params: stacked parameters, leading axis L.
        x: residual stream.
        per_layer: tree with a leading axis L, or None.
        mode: scan or unroll.
        remat: none, elementwise, dots or full.
    """
    body = _rematerialised(layer, remat)
    if mode == "scan":
        return jax.lax.scan(lambda h, part: (body(part[0], h, part[1]), None), x, (params, per_layer))[0]
    count = jax.tree.leaves(params)[0].shape[0]
    extras = unstack(per_layer) if per_layer is not None else [None] * count
    for i, (layer_params, extra) in enumerate(zip(unstack(params), extras, strict=True)):
        with jax.named_scope(str(i)):  # profiles and `jaxllm.study` read it
            x = body(layer_params, x, extra)
    return x


def _rematerialised(layer: Callable[..., Array], remat: str) -> Callable[..., Array]:
    policies = jax.checkpoint_policies
    if remat == "none":
        return layer
    policy = {
        "elementwise": policies.save_from_both_policies(policies.save_only_these_names(*_SAVED), _is_fused_attention),
        "dots": policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, _is_fused_attention),
        "full": policies.nothing_saveable,
    }[remat]
    return jax.checkpoint(layer, policy=policy)


def _is_fused_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    """A fused kernel's output and softmax statistics: neither a dot nor named, and without them it would run twice."""
    return primitive.name.startswith("dot_product_attention_fwd")
