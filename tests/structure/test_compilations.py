"""How often a run compiles: each of its programs once, however long it is."""

from __future__ import annotations

import collections
import logging
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config_file import parse_config
from jaxllm.training.compiled import CompiledOnce, RecompilationError
from jaxllm.training.trainer import pretrain


class Compilations(logging.Handler):
    """What XLA compiled, by the name of the jitted function, and the step that had been logged last."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        self.seen: list[tuple[str, int]] = []

    def emit(self, record: logging.LogRecord) -> None:
        step = re.match(r"step (\d+)/", record.getMessage())
        self.step = int(step.group(1)) if step else self.step
        compiled = re.match(r"Finished XLA compilation of jit\((.*?)\) in", record.getMessage())
        if compiled:
            self.seen.append((compiled.group(1), self.step))


@pytest.fixture
def compilations(caplog: pytest.LogCaptureFixture):
    jax.clear_caches()
    handler, loggers = Compilations(), [logging.getLogger(name) for name in ("jax._src.dispatch", "jaxllm")]
    for logger in loggers:
        logger.addHandler(handler)
    with caplog.at_level("INFO", logger="jaxllm"), jax.log_compiles():
        yield handler
    for logger in loggers:
        logger.removeHandler(handler)


def test_a_run_compiles_each_program_once(compilations: Compilations, tmp_path: Path, corpus: Path) -> None:
    model = {"family": "llama", "vocab_size": 400, "d_model": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    training = {
        "run_dir": str(tmp_path / "run"),
        "steps": 7,
        "batch_size": 2,
        "accumulation": 2,
        "log_every": 1,
        "eval_every": 2,
        "save_every": 2,
        "eval_batches": 2,
        "sample_tokens": 0,
    }
    data = {"source": "files", "path": str(corpus), "sequence_length": 16}
    assert pretrain(parse_config({"model": model, "data": data, "training": training})).finished
    names = collections.Counter(name for name, _ in compilations.seen)
    assert {name: names[name] for name in ("fresh", "train_step", "eval_step")} == {
        "fresh": 1,
        "train_step": 1,
        "eval_step": 1,
    }
    # The first evaluation and checkpoint come with step 2; after that the run compiles nothing at all.
    assert compilations.step == 7
    assert [name for name, step in compilations.seen if step > 2] == []


def test_a_changed_argument_is_refused_by_name() -> None:
    step = CompiledOnce(lambda state, batch: state + batch["tokens"].sum(), name="train step")
    batch = {"tokens": np.zeros((2, 4), np.float32)}
    assert step(jnp.zeros(()), batch) == 0 and step(jnp.ones(()), batch) == 1
    with pytest.raises(RecompilationError, match=r"(?s)train step was compiled.*'batch\['tokens'\]'.*called with.*2,5"):
        step(jnp.zeros(()), {"tokens": np.zeros((2, 5), np.float32)})
    with pytest.raises(RecompilationError, match="weights"):
        step(jnp.zeros(()), {**batch, "weights": np.zeros(3)})
