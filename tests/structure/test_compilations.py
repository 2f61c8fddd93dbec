"""How often a run and a decoding compile: each of their programs once, however long they are."""

from __future__ import annotations

import collections
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import LlamaConfig, T5Config
from jaxllm.config.file import parse_config
from jaxllm.generation import BeamSettings, beam_search, generate, generate_stream
from jaxllm.models import build, decoder_of, init_params
from jaxllm.ops.sampling import Sampling
from jaxllm.run.compiled import CompiledOnce, DeviceError, RecompilationError
from jaxllm.run.trainer import pretrain


class Compilations(logging.Handler):
    """What XLA compiled, by the name of the jitted function, and the step that had been logged last."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        self.seen: list[tuple[str, int]] = []

    def emit(self, record: logging.LogRecord) -> None:
        step = re.match(r"step (\d+) loss", record.getMessage())
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
    assert {name: names[name] for name in ("fresh_state", "train_step", "eval_step")} == {
        "fresh_state": 1,
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


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("INTERNAL: [cudnn_frontend] Error: No valid engine configs", "set model.attention=chunked"),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes", "raise training.accumulation"),
    ],
)
def test_what_a_device_cannot_do_comes_with_advice(said: str, advice: str) -> None:
    def fails(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError(f"{said}\nand a table of buffers")

    compiling, running = CompiledOnce(fails, name="train step"), CompiledOnce(lambda x: x, name="train step")
    running(np.zeros(3))
    running._executable = fails
    for step in (compiling, running):
        with pytest.raises(DeviceError, match=f"the train step cannot run here: .*{advice}") as stop:
            step(np.zeros(3))
        assert "table" not in str(stop.value)


def decodings(family: str) -> dict[str, tuple[tuple[str, ...], Callable[[list[list[int]], int], Any]]]:
    """Each way to decode: the programs it should need, and a call with prompts and a number of new tokens."""
    sizes = {"vocab_size": 61, "d_model": 16, "d_ff": 24, "num_layers": 1, "num_heads": 2, "head_dim": 8}
    model = build((LlamaConfig if family == "llama" else T5Config)(**sizes))
    params = init_params(model, jax.random.key(0))
    params = decoder_of(model).prepare(params)
    search = BeamSettings(beams=3)
    warm = {"sampling": Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.1), "eos_ids": (1,), "samples": 2}
    pieces = ("begin", "next_chunk")

    def streamed(prompts: list[list[int]], new: int) -> Any:
        return list(generate_stream(model, params, prompts, max_new_tokens=new))

    def stopped(prompts: list[list[int]], new: int) -> Any:
        options = {"stop": ("never",), "decode": str}
        return generate(model, params, prompts, max_new_tokens=new, **options)

    return {
        "greedy": (("run",), lambda prompts, new: generate(model, params, prompts, max_new_tokens=new)),
        "samples": (("run",), lambda prompts, new: generate(model, params, prompts, max_new_tokens=new, **warm)),
        "stream": (pieces, streamed),
        "stop strings": ((), stopped),  # the same programs as stream
        "beams": (
            ("_search",),
            lambda prompts, new: beam_search(model, params, prompts, max_new_tokens=new, search=search),
        ),
    }


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_decoding_compiles_its_programs_once_and_for_other_lengths_nothing(
    family: str, compilations: Compilations
) -> None:
    for way, (programs, call) in decodings(family).items():
        del compilations.seen[:]
        call([[5, 6, 7], [8, 9, 10, 11, 12, 13]], 8)
        large = [name for name, _ in compilations.seen if name in ("run", "begin", "next_chunk", "_search", "_run")]
        assert sorted(large) == sorted(programs), way
        del compilations.seen[:]
        call([[3] * 16, [4] * 9], 5)  # 16 columns and 8 new tokens, as before
        assert compilations.seen == [], way
