"""What the families are built from: hook points, modules that hold parameters, and dtypes apart from the model's.

A hook point is a value that a layer names, for `jaxllm.study` to find and for `remat: elementwise` to keep. Out of
scope: mathematics (`jaxllm.ops`), loops over layers (`jaxllm.models.stack`), families, caches.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxllm.models.model import refuse
from jaxllm.ops import pointwise
from jaxllm.ops.linear import biased_linear, custom_vjp, linear

Drop = Callable[[Array, str], Array]  # a value, and the name of its place, whose key it uses

# Each name, and whether `remat: elementwise` keeps the value: no matmul then runs twice, cheap operations do.
# `jaxllm.ops.attention` names one more, `attention_weights`, on the path that builds them.
HOOK_POINTS = {
    "input": False,
    "query": True,
    "key": True,
    "value": True,
    "heads": True,
    "attention_output": False,
    "after_attention": True,
    "cross_attention_output": False,
    "after_cross_attention": True,
    "gate": True,
    "up": True,
    "neurons": False,
    "mlp_output": False,
    "after_mlp": False,
}
KEPT = tuple(name for name, kept in HOOK_POINTS.items() if kept)


def mark(x: Array, name: str) -> Array:
    """The value itself, under a name of `HOOK_POINTS`; adds no operation to the program."""
    if name not in HOOK_POINTS:
        raise ValueError(f"{name!r} is not a hook point; known: {', '.join(HOOK_POINTS)}")
    return checkpoint_name(x, name)


def add(x: Float[Array, "B T D"], update: Float[Array, "B T D"], sublayer: str, drop: Drop | None = None) -> Array:
    """The residual stream after a sublayer, in its own dtype."""
    update = mark(update, f"{sublayer}_output")
    if drop is not None:
        update = drop(update, sublayer)
    return mark(x + update.astype(x.dtype), f"after_{sublayer}")


Params = dict[str, Any]
Map = Callable[[Array], Array]


class Islands(NamedTuple):
    """Dtypes of what a model does not compute in its compute dtype; None is the default.

    An island below float32 narrows sums inside it too, most of them in the backward pass; the precision ledger lists
    them. Prefill and decoding keep the defaults.

    Attributes:
        norms: squares, root and quotient of RMSNorm; float32.
        softmax: scores after their matmul, and weights before theirs; float32.
        relative_bias: T5's bias from its table on; float32 until it is laid out, then the compute dtype.
        mlp_output: output of T5's MLP; the compute dtype, but float32 under float16.
        residual: the residual stream; the compute dtype, but float32 in a float16 T5. A run on a GPU with bfloat16 sets
            it to that (`jaxllm.storage.folder.settle_residual`).
        logits: of the training loss, as they are stored; float32. Their exponentials always are.
    """

    norms: Any = None
    softmax: Any = None
    relative_bias: Any = None
    mlp_output: Any = None
    residual: Any = None
    logits: Any = None


DEFAULT_ISLANDS = Islands()

# Dtype of new parameters; by jax's default it would be float64 under jax_enable_x64.
MASTER = jnp.float32


def apply(module: nn.Module, params: Params, *args: Any, method: str | None = None, **kwargs: Any) -> Any:
    """`module.apply` for modules that hold nothing but parameters."""
    return module.apply({"params": params}, *args, method=method, **kwargs)


class LayerMaps(NamedTuple):
    """A layer's maps, each from its own parameters; the norms' outputs are in the compute dtype."""

    attn_norm: Map
    qkv: Callable[[Array], tuple[Array, Array, Array]]  # queries [B, T, N, H], keys and values [B, T, K, H]
    out: Map  # of all heads [B, T, N * H]
    mlp_norm: Map
    gate_up: Callable[[Array], tuple[Any, Array]]  # the gate, None without one, and its factor [B, T, F]
    activation: Map  # of the gate, or of the factor alone
    down: Map  # of the neurons [B, T, F]


class Linear(nn.Module):
    """x @ kernel (+ bias); the kernel is [in, out], float32 as a parameter and in x's dtype in the matmul."""

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
    """Holds the weight of `ops.pointwise.rms_norm`."""

    features: int
    eps: float
    inside: Any = None  # see `Islands.norms`

    def setup(self) -> None:
        """Creates the weight."""
        self.weight = self.param("weight", nn.initializers.ones, (self.features,), MASTER)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises the last axis."""
        return pointwise.rms_norm(x, self.weight.astype(x.dtype), eps=self.eps, inside=self.inside)


def embed(table: Float[Array, "V D"], tokens: Int[Array, "B T"], *, dtype: Any) -> Float[Array, "B T D"]:
    """Rows of the table in the compute dtype, NaN for ids outside it; the gradient sums a token's uses in float32."""
    return _lookup(jnp.asarray(table, dtype), tokens)  # parameters may be NumPy's


@custom_vjp
def _lookup(table: Array, tokens: Array) -> Array:
    # Indexing would take the nearest row for a wrong id, or count from the end: plausible, but wrong.
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
