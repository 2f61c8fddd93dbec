"""Whether a run fits into its devices: by the estimate before it starts, by the compiler's figure before it runs."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import jax

from jaxllm.models import abstract_params
from jaxllm.run.device import Device
from jaxllm.run.memory import host_memory
from jaxllm.training.fit import Fit, advice, check_fit, estimate_fit
from jaxllm.training.program import Program
from jaxllm.training.sharding import device_bytes

_log = logging.getLogger(__name__)


def announce_fit(program: Program, device: Device) -> Callable[[int], None]:
    """Logs the estimate, and returns what checks the compiler's figure.

    An estimate above the device's memory is a warning, since it errs on the safe side; XLA:CPU needs up to three times
    as much. A small run on a CPU, which compiles in seconds, has no estimate.

    Raises:
        FitError: when parameters and moments alone, which no compiler makes smaller, exceed it.
    """
    params = abstract_params(program.model)
    moments = jax.eval_shape(program.optimizer.init, params)
    state = Fit(device_bytes(params, device.count), device_bytes(moments, device.count), 0, 0, 0)
    limit = host_memory() // device.count if device.memory is None else device.memory
    check_fit(state, sum(state), limit=limit)
    if device.memory is None and 100 * sum(state) < limit:
        return functools.partial(_check_small, program, device.count, limit)
    fit = estimate_fit(program, devices=device.count)
    _log.info("%d x %s with %.1f GB each; this run: %s", device.count, device.kind, limit / 1e9, fit.table())
    if sum(fit) * (3 if device.memory is None else 1) > limit:
        _log.warning("that may be too large, so the compiler's own figure will decide; %s", advice(fit))
    return functools.partial(check_fit, fit, limit=limit)


def _check_small(program: Program, devices: int, limit: int, needed: int) -> None:
    if needed > limit:  # the estimate takes a second, and is for the advice alone
        check_fit(estimate_fit(program, devices=devices), needed, limit=limit)
