"""Memory that a run needs on each device: an estimate before anything is allocated, and the check of a figure.

Parameters, moments and gradients are counted leaf by leaf. Activations are what the traced forward pass keeps for the
backward pass, under the remat policy. XLA may fuse some of it away, so the estimate errs on the safe side. The memory
of the compiled step decides, before it runs.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
from jax.extend.core import Var

from jaxllm.config import RunConfig
from jaxllm.models import abstract_params
from jaxllm.training.names import is_stacked
from jaxllm.training.precision import cast_floating
from jaxllm.training.program import Program, program_of
from jaxllm.training.sharding import AnyMesh, device_bytes, shares_of


class FitError(ValueError):
    """A run that is too large for its device; the message names the settings to change."""


class Fit(NamedTuple):
    """Bytes that a run needs on each device."""

    # This device's share of the float32 master weights, and a copy in the compute dtype: of all parameters, or under
    # FSDP of those outside the stacks and of two layers.
    parameters: int
    moments: int  # its share of the optimizer's state
    gradients: int  # of that copy in the compute dtype, and its share of the float32 sums over microbatches and devices
    activations: int  # kept for the backward pass of one microbatch, and those of one layer again while it is used
    logits: int  # the chunk of the vocabulary loss, as logits, probabilities and gradient

    def table(self) -> str:
        """The parts and their sum in one line."""
        parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in self._asdict().items())
        return f"{parts}; {sum(self) / 1e9:.1f} GB in all"


def estimate_fit(program: Program, mesh: AnyMesh | None = None) -> Fit:
    """Memory of a run on each device of a mesh, laid out by `jaxllm.training.sharding`; None is a single device."""
    training, shares, devices = program.config.training, shares_of(mesh), 1 if mesh is None else mesh.size
    params = abstract_params(program.model)
    compute = jax.eval_shape(lambda tree: cast_floating(tree, program.dtype), params)
    rows = -(-training.batch_size // (training.accumulation * devices))
    masters = device_bytes(params, shares)
    copy = tree_bytes(compute) if shares == 1 else _whole_at_once(compute)
    loss_rows = program.abstract_batch(rows)["targets"].size
    return Fit(
        parameters=masters + (copy if shares > 1 or copy != masters else 0),
        moments=device_bytes(jax.eval_shape(program.optimizer.init, params), shares),
        gradients=copy + (masters if training.accumulation > 1 or devices > 1 else 0),
        activations=_activations(program.config, rows),
        logits=min(training.loss_chunk, loss_rows) * program.config.model.vocab_size * (8 + program.dtype.itemsize),
    )


def check_fit(fit: Fit, needed: int, *, limit: int | float) -> None:
    """Raises FitError for a run that needs more than `limit` bytes, with advice for the two largest parts."""
    if needed > limit:
        fit = fit if fit.activations else fit._replace(activations=needed - sum(fit))  # those were not estimated
        sizes = f"this run needs at least {needed / 1e9:.1f} GB and the device has {limit / 1e9:.1f} GB"
        raise FitError(f"{sizes}; by the estimate: {fit.table()}. {advice(fit)}")


def advice(fit: Fit) -> str:
    """The settings that make the two largest parts smaller."""
    fixes = {
        "activations": "raise training.accumulation (fewer rows at once) or set model.remat to elementwise or full",
        "moments": "set optimizer.moment_dtype=bfloat16 or optimizer.name=adafactor",
        "logits": "lower training.loss_chunk",
        "parameters": "choose a smaller model, or raise sharding.fsdp where devices hold copies",
        "gradients": "as parameters, or training.accumulation=1 if its activations then fit",
    }
    largest = sorted(fit._asdict().items(), key=lambda part: -part[1])[:2]
    return "; ".join(f"{name}: {fixes[name]}" for name, _ in largest)


def tree_bytes(tree: Any) -> int:
    """Bytes of all leaves, abstract or not."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _whole_at_once(compute: Any) -> int:
    """Bytes of what is outside the stacks, and of two layers of each: one is gathered while the other is used."""
    leaves = jax.tree_util.tree_leaves_with_path(compute)
    return sum(
        tree_bytes(leaf) * 2 // max(leaf.shape[0], 2) if is_stacked(path) else tree_bytes(leaf) for path, leaf in leaves
    )


def _activations(config: RunConfig, rows: int) -> int:
    def scanned(num_layers: int) -> int:
        model = dataclasses.replace(config.model, remat="none", layers="scan", num_layers=num_layers)
        return _kept(dataclasses.replace(config, model=model), rows)

    return _kept(config, rows) + max(scanned(2) - scanned(1), 0)


def _kept(config: RunConfig, rows: int) -> int:
    """Bytes that `jax.vjp` of a microbatch's loss keeps, without the arguments and parts of them."""
    program = program_of(config)
    params = jax.eval_shape(lambda tree: cast_floating(tree, program.dtype), abstract_params(program.model))

    def kept(tree: Any, batch: Any) -> Any:
        return jax.vjp(lambda part: program.loss(part, batch, jax.random.key(0)).loss, tree)[1]

    closed, shapes = jax.make_jaxpr(kept, return_shape=True)(params, program.abstract_batch(rows))
    # Layers that are not a loop keep slices of the stacked parameters, which are counted as parameters already.
    given = set(closed.jaxpr.invars)
    for equation in closed.jaxpr.eqns:
        first = equation.invars[0] if equation.primitive.name in ("slice", "split", "squeeze") else None
        if isinstance(first, Var) and first in given:
            given.update(equation.outvars)
    outputs = zip(closed.jaxpr.outvars, jax.tree.leaves(shapes), strict=True)
    kept_once = {var: shape for var, shape in outputs if isinstance(var, Var) and var not in given}
    return tree_bytes(list(kept_once.values()))
