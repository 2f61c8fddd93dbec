"""The train step as scripts/pretrain.py runs it, on synthetic batches of real shapes."""

import statistics
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from benchmarks.gpu.card import CLOCKS, achievable, smi
from benchmarks.gpu.profile import traced
from benchmarks.gpu.program import cudnn_calls
from benchmarks.gpu.variants import split
from benchmarks.report import report, spread
from benchmarks.shapes import shape
from jaxllm.config import DataConfig, OptimizerConfig, PrecisionConfig, RunConfig, TrainingConfig
from jaxllm.config.file import with_overrides
from jaxllm.host.device import detect_device
from jaxllm.models.family import train_flops
from jaxllm.ops.cudnn import refused
from jaxllm.training.fit import estimate_fit
from jaxllm.training.program import Program, program_of


class Case(NamedTuple):
    """One train step."""

    shape: str  # name of the model's shape
    rows: int  # rows of a microbatch
    length: int  # tokens of a row, of the encoder for T5
    targets: int = 0  # tokens of a decoder row
    compute: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # dtype; float16 comes with a dynamic loss scale
    documents: int = 1  # documents packed into a row and kept apart; 1 turns the document mask off. T5's rows hold one
    accumulation: int = 1  # microbatches
    remat: str = "elementwise"  # what the backward pass computes again
    lengths: bool = True  # whether T5's rows come with their lengths
    # dtype of the residual stream, None for the model's own; scripts/pretrain.py takes bfloat16 for a float16 T5 on a
    # GPU
    residual: Literal["float32", "bfloat16"] | None = None
    settings: tuple[str, ...] = ()  # other settings of the run, each as `section.key=value`


CASES = {
    "llama_1b": Case("1b", 8, 4096),
    "llama_8b_8layers": Case("8b_8layers", 2, 8192),
    "t5_large": Case("t5_large", 64, 512, 114),
    "t5_base": Case("t5_base", 128, 512, 114),
    "llama_1b_fp16": Case("1b", 8, 4096, compute="float16"),
    "t5_large_fp16": Case("t5_large", 64, 512, 114, compute="float16", residual="bfloat16"),
    "llama_1b_packed": Case("1b", 8, 4096, documents=4),
    "llama_8b_8layers_packed": Case("8b_8layers", 2, 8192, documents=4),
    "llama_1b_accumulated": Case("1b", 8, 4096, accumulation=8),
    "llama_1b_no_remat": Case("1b", 4, 4096, remat="none"),
}


def case_of(name: str) -> Case:
    """The case of a name, changed by the variants behind its @."""
    base, variants = split(name)
    case = CASES[base]
    for variant in variants:
        case = case._replace(**variant.case)._replace(settings=(*case.settings, *variant.settings))
    return case


def run_config(case: Case, *, toy: bool) -> RunConfig:
    """The run of a case."""
    model = shape(case.shape, toy=toy, remat=case.remat)
    t5 = model.encoder_decoder
    config = RunConfig(
        model=model,
        precision=PrecisionConfig(
            compute=case.compute,
            loss_scale="dynamic" if case.compute == "float16" else "none",
            islands={"residual": case.residual} if case.residual else {},
        ),
        optimizer=OptimizerConfig(schedule="constant", name="adamw_rms" if t5 else "adamw"),
        data=DataConfig(
            objective="span_corruption" if t5 else "causal",
            document_mask=t5 or case.documents > 1,
            sequence_length=16 if toy else case.length,
            target_length=(8 if toy else case.targets) if t5 else None,
        ),
        training=TrainingConfig(
            batch_size=(2 if toy else case.rows) * case.accumulation,
            accumulation=case.accumulation,
            loss_chunk=8 if toy else 4096,
        ),
    )
    return with_overrides(config, case.settings)


def synthetic_batch(config: RunConfig, *, documents: int, lengths: bool = True) -> dict[str, np.ndarray]:
    """A batch of random tokens in rows of equally long documents."""
    rng, rows = np.random.default_rng(0), config.training.batch_size

    def tokens(length: int) -> np.ndarray:
        return rng.integers(1, config.model.vocab_size, (rows, length), dtype=np.int32)

    length, targets = config.data.sequence_length, config.data.target_length
    if targets is not None:
        names = {"encoder_tokens": tokens(length), "decoder_tokens": tokens(targets)}
        if lengths:
            names["encoder_lengths"] = np.full(rows, length, np.int32)
    else:
        names = {"tokens": tokens(length), "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1))}
        if config.data.document_mask:
            names["segment_ids"] = np.tile(np.arange(length, dtype=np.int32) * documents // length + 1, (rows, 1))
    width = targets or length
    return {**names, "targets": tokens(width), "weights": np.ones((rows, width), np.float32)}


class Prepared(NamedTuple):
    """A compiled train step."""

    program: Program  # of the run, with the attention that it takes
    step: Any  # compiled, its state donated
    seconds: float  # for compiling


def compile_step(config: RunConfig, batch: Any) -> Prepared:
    """The train step of a run; where cuDNN refuses an attention that `auto` chose, by blocks, as the trainer does."""
    try:
        program, before = program_of(config), time.perf_counter()
        compiled = jax.jit(program.train_step, donate_argnums=0).lower(program.abstract_state(), batch).compile()
        return Prepared(program, compiled, time.perf_counter() - before)
    except Exception as error:
        if config.model.attention != "auto" or not refused(error):
            raise
        print(f"attention: chunked, because cuDNN refused: {error}"[:2000], flush=True)
    return compile_step(with_overrides(config, ["model.attention=chunked"]), batch)


# Steps that are timed: groups of so many, after two to warm up.
_GROUPS, _SIZE = 4, 3


def main(name: str, *, toy: bool, profile: bool = False) -> None:
    """Measures and reports one case; `profile` also prints its largest kernels."""
    case = case_of(name)
    config = run_config(case, toy=toy)
    batch = jax.device_put(synthetic_batch(config, documents=case.documents, lengths=case.lengths))
    program, step, compile_seconds = compile_step(config, batch)
    state, metrics = jax.jit(program.fresh_state)(), []

    def run(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state, last = step(state, batch)
            metrics.append(last)
        jax.block_until_ready(metrics[-1])

    run(1 if toy else 2)
    before = smi(*CLOCKS)
    times = [_seconds_per_step(run, 1)] if toy else [_seconds_per_step(run, _SIZE) for _ in range(_GROUPS)]
    after = smi(*CLOCKS)
    losses = [float(each.loss) for each in metrics]
    if not all(np.isfinite(losses)):
        raise SystemExit(f"{name}: the loss is not finite: {losses}")
    values = {
        "seconds": spread(times),
        "compile_seconds": compile_seconds,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "attention": program.config.model.attention,
        "cudnn_calls": cudnn_calls(step.as_text() or ""),
        "clocks": [before, after],
        "estimated_gb": sum(estimate_fit(program)) / 1e9,
        **speed(config, statistics.median(times)),
        **memory(step),
    }
    report("train", name, **values)
    if profile:  # after the result, which it might cost; the last one printed counts
        figures = traced("train", name, run, steps=2, seconds=statistics.median(times), program=step.as_text)
        report("train", name, **values, **figures)


def _seconds_per_step(run: Callable[[int], Any], count: int) -> float:
    """Seconds of a run of `count` steps, which returns when the device has done them."""
    before = time.perf_counter()
    run(count)
    return (time.perf_counter() - before) / count


def speed(config: RunConfig, seconds: float) -> dict[str, float]:
    """Tokens or sequences per second, and the fraction of the device's peak."""
    rows, length, targets = config.training.batch_size, config.data.sequence_length, config.data.target_length
    flops = train_flops(config.model, batch=rows, length=length, target_length=targets or 0)
    values = {"tflops": flops.causal / seconds / 1e12}
    values |= {"sequences_per_second": rows / seconds} if targets else {"tokens_per_second": rows * length / seconds}
    device = detect_device()
    reachable = achievable(device.kind)
    if device.flops is not None:
        values |= {"mfu": flops.causal / seconds / device.flops, "mfu_palm": flops.full / seconds / device.flops}
    if reachable is not None:
        values["part_of_measured_matmul"] = flops.causal / seconds / reachable[0]
    return values


def memory(step: Any) -> dict[str, float]:
    """Gigabytes that the executable allocates, and the most that the device has held."""
    analysis, stats = step.memory_analysis(), jax.devices()[0].memory_stats() or {}
    values = {} if analysis is None else {"temporary_gb": analysis.temp_size_in_bytes / 1e9}
    return values | ({"peak_gb": stats["peak_bytes_in_use"] / 1e9} if "peak_bytes_in_use" in stats else {})
