"""Whether a run fits into its devices: by the estimate before it starts, by the compiler's figure before it runs."""

import functools
import logging
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from jaxllm.host.device import Device, host_memory
from jaxllm.models import abstract_params
from jaxllm.training.fit import Fit, advice, check_fit, estimate_fit
from jaxllm.training.program import Program
from jaxllm.training.sharding import device_bytes, shares_of

_log = logging.getLogger(__name__)


def announce_fit(program: Program, device: Device, mesh: Mesh | None = None) -> Callable[[int], None]:
    """Logs the estimate, and returns what checks the compiler's figure.

    Parameters and moments that alone exceed the device's memory are a FitError. A larger estimate is a warning: it errs
    on the safe side, but XLA:CPU needs up to three times as much. A small run, which compiles in seconds on a CPU, has
    none there.
    """
    on_cpu = device.kind == "cpu"
    if device.memory is None and not on_cpu:
        return lambda needed: None
    params, shares = abstract_params(program.model), shares_of(mesh)
    moments = jax.eval_shape(program.optimizer.init, params)
    state = Fit(device_bytes(params, shares), device_bytes(moments, shares), 0, 0, 0)
    limit = device.memory or host_memory() // device.count
    check_fit(state, sum(state), limit=limit)
    if on_cpu and 100 * sum(state) < limit:
        return lambda needed: check_fit(state._replace(activations=max(needed - sum(state), 0)), needed, limit=limit)
    fit = estimate_fit(program, mesh)
    _log.info("%d x %s with %.1f GB each; this run: %s", device.count, device.kind, limit / 1e9, fit.table())
    if sum(fit) * (3 if on_cpu else 1) > limit:
        _log.warning("that may be too large, so the compiler's own figure will decide; %s", advice(fit))
    return functools.partial(check_fit, fit, limit=limit)
