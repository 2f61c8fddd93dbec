"""cuDNN refuses an attention: `auto` falls back once, by name, before anything is written; nothing else does."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Primitive
from jax.interpreters import mlir

from benchmarks.gpu import train
from display.evaluation import evaluate_path
from jaxllm.config import LlamaConfig, RunConfig, T5Config
from jaxllm.config.file import load_config
from jaxllm.generation import (
    BeamSettings,
    beam_search,
    generate,
    generate_stream,
    loop,
    score,
)
from jaxllm.models import build, init_params
from jaxllm.ops import attention, cudnn
from jaxllm.ops.cudnn import calls_in, refused
from jaxllm.ops.masks import Pattern
from jaxllm.run.compiled import DeviceError
from jaxllm.run.record import read_metrics
from jaxllm.run.trainer import pretrain
from tests.run.test_pretrain import config, losses
from tests.structure.programs import pretend_gpu, traced_train_step

# As jax-ml/jax#23227, openxla/xla#11129 and TransformerEngine#1591 have them, and others that must stop a run.
REFUSALS = (
    "INTERNAL: No valid engine configs for Matmul_MUL_\nin external/xla/cuda_dnn.cc(8382): 'create_execution_plans'",
    "INTERNAL: CUDNN_BACKEND_OPERATION: cudnnFinalize Failed cudnn_status: CUDNN_STATUS_BAD_PARAM",
    "INTERNAL: [cudnn_frontend] Error: No execution plans support the graph",
    "NOT_FOUND: No FFI handler registered for __cudnn$fmhaSoftmax on a platform Host (canonical host)",
)
OTHERS = (
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes, of which __cudnn$fmhaSoftmax has 5",
    "FAILED_PRECONDITION: DNN library initialization failed. cuDNN",
    "INTERNAL: CUDNN_STATUS_NOT_INITIALIZED",
    "INTERNAL: ptxas exited with non-zero error code 65280",
    "INTERNAL: Autotuning failed for HLO: " + "x" * 600 + "__cudnn$fmhaSoftmax",
)
# What jax raises while it lowers an attention for cuDNN, and errors of the same classes that must stop a run.
WHILE_LOWERING = (
    RuntimeError("cuDNN is not detected."),
    NotImplementedError("Compute capability 10.3 requires cuDNN version >= 9.11."),
    NotImplementedError("The head dim must be <= 128 and a multiple of 8, but got 192."),
    NotImplementedError("Unsupported sequence length Q 57, KV 57."),
    ValueError("Bias must have same seq length as QKV, got 1 and 128"),
    ValueError("Query and bias should have same sharding on batch and num_head dim."),
)
NOT_ABOUT_CUDNN = (
    RuntimeError("the data has ended"),
    NotImplementedError("Differentiation rule for 'reduce' not implemented"),
    ValueError("attention: cudnn cannot run this: cuDNN needs float16 or bfloat16; use attention: auto or chunked"),
    DeviceError("the train step cannot run here: cuDNN is not detected."),
    TypeError("cuDNN is not detected."),
)


def test_only_a_refused_plan_counts() -> None:
    assert all(refused(jax.errors.JaxRuntimeError(text)) for text in REFUSALS)
    assert not any(refused(jax.errors.JaxRuntimeError(text)) for text in OTHERS)
    assert not refused(ValueError(REFUSALS[0]))
    assert all(refused(error) for error in WHILE_LOWERING)
    assert not any(refused(error) for error in NOT_ABOUT_CUDNN)


def test_jax_still_raises_what_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    """jax's own checks, as they are called when an attention is lowered."""

    def refusal(width: int, bias: jax.Array | None = None) -> BaseException:
        heads = jnp.zeros((1, 57, 2, width), jnp.bfloat16)
        attend = functools.partial(jax.nn.dot_product_attention, bias=bias, implementation="cudnn")
        with pytest.raises(RuntimeError) as raised:
            jax.jit(jax.grad(lambda query: attend(query, heads, heads).sum())).lower(heads)
        return raised.value

    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.cuda_versions", None)
    found = [refusal(64)]
    pretend_gpu(monkeypatch)
    found += [refusal(512), refusal(64, jnp.zeros((1, 2, 57, 57), jnp.bfloat16))]
    assert [type(error) for error in found] == [RuntimeError, NotImplementedError, NotImplementedError]
    assert all(refused(error) for error in found), found


def test_an_attention_that_jax_refuses_while_tracing_takes_blocks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A GPU without cuDNN: every program that is traced falls back, initialisation and memory estimates included."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.cuda_versions", None)
    heads = jnp.ones((1, 128, 2, 64), jnp.bfloat16)
    options = {"pattern": Pattern(causal=True), "scale": 0.1}
    with caplog.at_level(logging.INFO):
        found = attention.attention(heads, heads, heads, **options)
    assert caplog.messages[-1] == "attention: chunked (cuDNN is not detected.)"
    want = attention.attention(heads, heads, heads, implementation="chunked", **options)
    assert (found == want).all()
    with pytest.raises(RuntimeError, match="cuDNN is not detected"):
        attention.attention(heads, heads, heads, implementation="cudnn", **options)


def test_refused_calls_are_named_with_their_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch)
    case = train.case_of("t5_base")
    text = traced_train_step(train.run_config(case, toy=True)).lower(lowering_platforms=("cuda",)).as_text()
    found = calls_in(text)
    # Encoder, decoder and cross-attention, each with its backward pass.
    assert len(found) == 6 and "fmhaScaleBiasSoftmaxBackward [2x16x4x8xbf16] [2x16x4x8xbf16]" in found
    assert "fmhaSoftmax [2x8x4x8xbf16] [2x16x4x8xbf16]" in found


BY_THE_COMPILER = "No FFI handler"


def ask_the_compiler(query: jax.Array) -> jax.Array:
    """Refused by XLA:CPU when it compiles."""
    return jax.ffi.ffi_call("__cudnn$fmhaSoftmax", jax.ShapeDtypeStruct(query.shape, query.dtype))(query)


def refuse_to_lower(context: Any, query: Any) -> Any:
    raise ValueError("Query, key and value should have same sharding.")


BY_JAX = "Query, key and value should have same sharding"
lowered_by_jax = Primitive("cudnn_attention_that_jax_refuses")
lowered_by_jax.def_abstract_eval(lambda query: query)
mlir.register_lowering(lowered_by_jax, refuse_to_lower)


@pytest.fixture
def refusing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """`auto` chooses cuDNN, which is refused with the message that the fixture gives, its parameter."""
    message = getattr(request, "param", BY_THE_COMPILER)
    real = attention.choose

    def choose(implementation: str, query: jax.Array, key: jax.Array, **options: Any) -> str:
        wanted = implementation in ("auto", "cudnn") and query.shape[1] > 1
        return "cudnn" if wanted else real(implementation, query, key, **options)

    ask = jax.custom_vjp(lowered_by_jax.bind if message == BY_JAX else ask_the_compiler)
    ask.defvjp(lambda query: (ask(query), None), lambda _, grad: (grad,))
    monkeypatch.setattr(attention, "choose", choose)
    monkeypatch.setattr(attention.cudnn, "fused_attention", lambda query, key, value, **_: ask(query))
    monkeypatch.setattr("jaxllm.run.steps.backend", SimpleNamespace(on_gpu=lambda: True))
    yield message
    jax.clear_caches()  # what was traced with these functions must not be found by other tests
    loop._chunked.clear()


def run_of(tmp_path: Path, corpus: Path, **changes: Any) -> RunConfig:
    return config(tmp_path / "run", corpus, **{"training": {"steps": 2, "save_every": 2, "eval_every": 2}, **changes})


T5_RUN = {
    "model": {"family": "t5", "head_dim": 8},
    "data": {"objective": "span_corruption", "sequence_length": 32},
}


@pytest.mark.parametrize(
    ("changes", "refusing"),
    [({}, BY_THE_COMPILER), (T5_RUN, BY_THE_COMPILER), ({}, BY_JAX)],
    ids=["llama", "t5", "llama, lowering"],
    indirect=["refusing"],
)
def test_a_run_takes_blocks_instead_and_keeps_that(
    changes: dict[str, Any], refusing: str, tmp_path: Path, corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(tmp_path, corpus, **changes)
    with caplog.at_level(logging.INFO):
        summary = pretrain(run, stop_at=1)
    assert summary.step == 1
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said[-1].startswith(
        "attention: chunked instead of auto, because cuDNN refused a call: the evaluation step cannot run"
    )
    assert refusing in said[-1]
    if len(said) > 1:  # there was a program, whose calls are named
        assert len(said) == 2 and refusing == BY_THE_COMPILER and "needs cuDNN plans for" in said[0]
    assert load_config(summary.folder / "config.yaml").model.attention == "chunked"
    assert pretrain(run).finished  # resumed by the same config, with attention: auto


@pytest.mark.usefixtures("refusing")
def test_a_run_that_asks_for_cudnn_by_name_stops_and_writes_nothing(tmp_path: Path, corpus: Path) -> None:
    run = run_of(tmp_path, corpus, model={"attention": "cudnn"})
    with pytest.raises(DeviceError, match=r"set model\.attention=chunked"):
        pretrain(run)
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


EITHER = pytest.mark.parametrize("refusing", [BY_THE_COMPILER, BY_JAX], ids=["compiling", "lowering"], indirect=True)


@EITHER
def test_another_error_stops_a_run(
    refusing: str, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cudnn, "_REFUSED", ("something else",))
    monkeypatch.setattr(cudnn, "_REFUSED_BEFORE", {})
    with pytest.raises((RuntimeError, ValueError), match=refusing):
        pretrain(run_of(tmp_path, corpus))


def test_a_fallen_back_run_equals_one_by_blocks(
    refusing: str, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No batch is lost to the first attempt, and the state is the same."""
    run = run_of(tmp_path, corpus)
    pretrain(run)
    monkeypatch.undo()
    blocks = config(tmp_path / "blocks", corpus, model={"attention": "chunked"}, training={"steps": 2, "save_every": 2})
    pretrain(blocks)
    assert losses(run) == losses(blocks)


def test_evaluations_outside_of_training_take_blocks(
    tmp_path: Path, corpus: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a run that ended between its last save and evaluation, and of `scripts/evaluate.py`."""
    run = run_of(tmp_path, corpus)
    values = pretrain(run).validation
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "validation/loss" not in row]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    jax.clear_caches()
    request.getfixturevalue("refusing")
    again = pretrain(run)
    found = evaluate_path(tmp_path / "run")
    assert caplog.text.count("because cuDNN refused a call: the evaluation step") == 2
    for name in ("loss", "accuracy"):
        assert again.validation[name] == pytest.approx(values[name], rel=1e-5)
        assert found[name] == pytest.approx(values[name], rel=1e-5)


@EITHER
@pytest.mark.usefixtures("refusing")
def test_a_benchmarked_step_falls_back(capsys: pytest.CaptureFixture[str]) -> None:
    run = train.run_config(train.case_of("llama_1b"), toy=True)
    made = train.compile_step(run, train.synthetic_batch(run, documents=1))
    assert made.program.config.model.attention == "chunked" and "because cuDNN refused" in capsys.readouterr().out


SIZES = {"vocab_size": 61, "d_model": 16, "d_ff": 24, "num_layers": 1, "num_heads": 2, "head_dim": 8}


@pytest.mark.parametrize(
    ("family", "refusing"),
    [(LlamaConfig, BY_THE_COMPILER), (T5Config, BY_THE_COMPILER), (LlamaConfig, BY_JAX)],
    indirect=["refusing"],
)
@pytest.mark.usefixtures("refusing")
def test_prompts_are_read_by_blocks(family: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = build(family(**SIZES))
    params = init_params(model, jax.random.key(0))
    prompts, options = [[5, 6, 7, 8]], {"max_new_tokens": 4}
    plain = build(family(**SIZES, attention="chunked"))
    assert generate(model, params, prompts, **options) == generate(plain, params, prompts, **options)
    assert len(caplog.records) == 1 and "cuDNN refused a call" in caplog.text
    assert list(generate_stream(model, params, prompts, **options))
    assert beam_search(model, params, prompts, search=BeamSettings(beams=2), **options)
    assert len(score(model, params, prompts, [[3, 4]])[0]) == 2
    assert len(caplog.records) == 1  # said once, tried once


@EITHER
def test_prompts_for_cudnn_by_name_are_refused(refusing: str) -> None:
    model = build(LlamaConfig(**SIZES, attention="cudnn"))
    params = init_params(model, jax.random.key(0))
    with pytest.raises((RuntimeError, ValueError), match=refusing):
        generate(model, params, [[5, 6]], max_new_tokens=4)
