"""Stop signals, and the end of `training.stop_after`, become a flag that the loop reads between two steps."""

import contextlib
import itertools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from jax.experimental.multihost_utils import reached_preemption_sync_point

from jaxllm.host import processes

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def stop_signals(deadline: float = float("inf")) -> Iterator[Callable[[], bool]]:
    """Turns the first SIGTERM, SIGUSR1 or Ctrl-C into a flag; a second one acts as usual.

    The flag also becomes true when `time.monotonic()` has reached the deadline, from the second call on: each start
    makes a step.

    With several processes, SIGTERM to any of them is noticed by jax, which a handler here would prevent. The flag then
    becomes true in the same call on all of them. SIGUSR1 sends the process a SIGTERM, and the deadline sends one to the
    first process. Calls are counted from this start: jax compares numbers for equality, so that a signal before the
    first call would be lost if that had the number of a later step.
    """
    several, calls, received = processes.several(), itertools.count(), list[int]()
    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # elsewhere the caller owns the signals
        handled = (signal.SIGUSR1,) if several else (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        previous = {number: signal.getsignal(number) for number in handled}

    def handle(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(number, previous[number])
        if several:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        _log.info("%s: after this step, evaluation or compilation the run is saved", signal.Signals(number).name)

    def stopped() -> bool:
        call = next(calls)
        late = call > 0 and not received and time.monotonic() >= deadline and processes.index() == 0
        if late:
            received.append(0)
            _log.info("training.stop_after has passed: the run is saved")
        if several and late:
            os.kill(os.getpid(), signal.SIGTERM)
        return reached_preemption_sync_point(call) if several else bool(received)

    for number in previous:
        signal.signal(number, handle)
    try:
        yield stopped
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
