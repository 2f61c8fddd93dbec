"""Whether a run fits into its devices: by the estimate before it starts, by the compiler's figure before it runs."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

from jax.sharding import Mesh

from jaxllm.models import abstract_params
from jaxllm.run.device import Device
from jaxllm.training.fit import check_fit, estimate_fit
from jaxllm.training.program import Program
from jaxllm.training.sharding import device_bytes, shares_of

_log = logging.getLogger(__name__)


def announce_fit(program: Program, device: Device, mesh: Mesh | None = None) -> Callable[[int], None]:
    """Logs the estimate, and returns what checks the compiler's figure; nothing of it where memory is not known (CPU).

    An estimate above the device's memory is a warning, since it errs on the safe side.

    Raises:
        FitError: when parameters and moments alone, which no compiler makes smaller, exceed it.
    """
    if device.memory is None:
        return lambda needed: None
    fit = estimate_fit(program, mesh)
    _log.info("%d x %s with %.1f GB each; this run: %s", device.count, device.kind, device.memory / 1e9, fit.table())
    masters = device_bytes(abstract_params(program.model), shares_of(mesh))
    state = fit._replace(parameters=masters, gradients=0, activations=0, logits=0)
    check_fit(state, sum(state), limit=device.memory)
    if sum(fit) > device.memory:
        _log.warning("that may be too large; it errs on the safe side, so the compiler's own figure will decide")
    return functools.partial(check_fit, fit, limit=device.memory)
