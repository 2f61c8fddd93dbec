"""How fast a run trains: tokens per second, model FLOP utilisation, and the share of time that waits for data."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from jaxllm.config import RunConfig
from jaxllm.run.device import Device
from jaxllm.run.record import train_flops


class Throughput:
    """Tokens per second, utilisation and the host's share of waiting for data, since the last reading."""

    def __init__(self, config: RunConfig, lengths: tuple[int, int], device: Device) -> None:
        """`lengths` are those of a row on both sides, as `Recipe.lengths`."""
        length, target_length = lengths
        batch = config.training.batch_size
        self._flops = train_flops(config.model, batch=batch, length=length, target_length=target_length)
        self._peak = None if device.flops is None else device.flops * device.count
        self._reset()

    def _reset(self) -> None:
        self._start = time.perf_counter()
        self._tokens = self._waited = 0.0
        self._steps = 0

    def add(self, tokens: float) -> None:
        """Counts a step."""
        self._tokens += tokens
        self._steps += 1

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent here is the host waiting for data."""
        before = time.perf_counter()
        yield
        self._waited += time.perf_counter() - before

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent here (evaluation, checkpoints) is not training's."""
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before

    def read(self) -> dict[str, float]:
        """The figures since the last reading; model FLOP utilisation where the device's peak is known."""
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        rate, flops = self._steps / elapsed, self._flops
        values = {
            "tokens_per_second": self._tokens / elapsed,
            "tflops": rate * flops.causal / 1e12,
            "data_wait": self._waited / elapsed,
        }
        if self._peak is not None:
            work = {"mfu": flops.causal, "mfu_palm": flops.full, "mfu_6n": flops.weights}
            values |= {name: rate * done / self._peak for name, done in work.items()}
        self._reset()
        return values
