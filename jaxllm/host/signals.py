"""Stop signals become a flag that the loop reads between two steps."""

import contextlib
import itertools
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from jax.experimental.multihost_utils import reached_preemption_sync_point

from jaxllm.host import processes

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Turns the first SIGTERM or Ctrl-C into a flag; a second one acts as usual.

    With several processes, SIGTERM to any of them is noticed by jax, which a handler here would prevent. The flag then
    becomes true in the same call on all of them. Calls are counted from this start: jax compares numbers for equality,
    so that a signal before the first call would be lost if that had the number of a later step.
    """
    if processes.several():
        calls = itertools.count()
        yield lambda: reached_preemption_sync_point(next(calls))
        return
    received: list[int] = []
    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # elsewhere the caller owns the signals
        previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(number, previous[number])
        _log.info("%s: after this step, evaluation or compilation the run is saved", signal.Signals(number).name)

    for number in previous:
        signal.signal(number, handle)
    try:
        yield lambda: bool(received)
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
