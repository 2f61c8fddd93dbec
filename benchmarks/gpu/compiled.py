"""What XLA's GPU compiler makes of the benchmark's programs for an H200, on a machine without one; nothing is run.

    bash benchmarks/gpu/compiler.sh                        # once: the compiler, 150 MB, into gpu_compiler/
    python -m benchmarks.gpu.compiled train/t5_large decode/8b_b1
    python -m benchmarks.gpu.compiled train/llama_1b@cublas --layers 4       # a variant of it, in 4 layers
    python -m benchmarks.gpu.compiled configs/t5_large.yaml model.layers=scan
    python -m benchmarks.gpu.compiled configs/llama3_70b.yaml --mesh data=1,fsdp=64        # figures of each of 64 cards
    python -m benchmarks.gpu.compiled configs/llama3_8b_80gb.yaml --card H100

Memory, kernels and what they move are the compiler's own answer. Two things need a GPU and are missing: XLA does not
time its candidates for each matmul, and cuDNN's attention is called by name but not built. So no speed is claimed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from benchmarks.gpu import decode, train
from benchmarks.gpu.cards import CARDS, devices_of, pretend_gpu
from benchmarks.gpu.program import Kernel, dimensions, kernels, nbytes
from benchmarks.gpu.table import insert
from benchmarks.gpu.variants import split
from benchmarks.shapes import shape
from jaxllm.config import RunConfig, T5Config
from jaxllm.config.file import load_config
from jaxllm.config.run import ShardingConfig
from jaxllm.data.objectives import row_lengths
from jaxllm.generation import loop
from jaxllm.generation.requests import make_request
from jaxllm.models import abstract_params, build
from jaxllm.models.family import train_flops
from jaxllm.training.fit import estimate_fit, tree_bytes
from jaxllm.training.names import is_stacked
from jaxllm.training.program import Program, program_of
from jaxllm.training.sharding import (
    check_rows,
    device_bytes,
    make_mesh,
    row_sharding,
    shares_of,
    state_shardings,
    state_specs,
)

ROOT = Path(__file__).parent.parent.parent
COMPILER = ROOT / "gpu_compiler"
RESULTS = ROOT / "benchmarks" / "results" / "compiled_H200.json"
GUIDE = ROOT / "docs" / "gpu.md"
MARKERS = "<!-- compiled for a GPU: benchmarks/gpu/compiled.py -->", "<!-- end of compiled for a GPU -->"


# Full effort, whatever the environment has.
_OPTIONS = {"xla_backend_optimization_level": 3}


class Traced(NamedTuple):
    """A program to compile, and what it should need.

    Attributes:
        traced: on abstract arguments.
        steps: how many steps one run of it takes.
        facts: figures to show next to the compiler's.
    """

    traced: Any
    steps: int
    facts: dict[str, float]


def place(tree: Any, layout: Any) -> Any:
    """The shapes of a tree on devices that do not exist here: on one device, or split by a layout."""
    if isinstance(layout, jax.Device):
        layout = jax.sharding.SingleDeviceSharding(layout)
    if isinstance(layout, jax.sharding.Sharding):
        layout = jax.tree.map(lambda _: layout, tree)
    return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), tree, layout)


def train_case(config: RunConfig, layers: int | None, cards: Sequence[Any], *, lengths: bool = True) -> Traced:
    """The train step of a run on so many cards, `sharding.fsdp` of them to a copy of the state."""
    devices = len(cards)
    config = dataclasses.replace(config, model=_cut(config.model, layers))
    check_rows(batch_size=config.training.batch_size, accumulation=config.training.accumulation, devices=devices)
    mesh = make_mesh(cards, fsdp=config.sharding.fsdp)
    program = program_of(config, mesh)
    state, batch = program.abstract_state(), program.abstract_batch()
    if not lengths:
        del batch["encoder_lengths"]
    layout, rows = cards[0], cards[0]
    options: dict[str, Any] = {}
    if mesh is not None:
        layout, rows = state_shardings(state, mesh), row_sharding(mesh)
        options = {"out_shardings": (layout, None)}
    data = config.data
    flops = train_flops(
        config.model, batch=config.training.batch_size, length=data.sequence_length, target_length=row_lengths(data)[1]
    )
    facts = {
        "state_gb": device_bytes(state, shares_of(mesh)) / 1e9,
        "estimated_gb": sum(estimate_fit(program, mesh)) / 1e9,
        "needed_gflops": flops.weights / devices / 1e9,
        "needed_exchange_gb": {kind: size / 1e9 for kind, size in exchange_bytes(program, mesh).items()},
    }
    step = jax.jit(program.train_step, donate_argnums=0, **options)
    return Traced(step.trace(place(state, layout), place(batch, rows)), 1, facts)


def exchange_bytes(program: Program, mesh: Mesh | None) -> dict[str, float]:
    """Bytes that a device must get from others in a step, by kind.

    In each microbatch all weights that are split are gathered, those of layers twice, and their gradients summed in
    float32. At its end gradients are summed over the copies, and over all devices where they are not split.
    """
    if mesh is None:
        return {}
    params, shares, copies = abstract_params(program.model), shares_of(mesh), mesh.shape["data"]
    specs = jax.tree.leaves(state_specs(params, shares))
    gathered = scattered = reduced = 0.0
    for (path, leaf), spec in zip(jax.tree_util.tree_leaves_with_path(params), specs, strict=True):
        if spec:
            gathered += leaf.size * (1 + is_stacked(path)) * program.dtype.itemsize
            scattered += leaf.size * 4
            reduced += 2 * leaf.size * 4 / shares * (copies - 1) / copies
        else:
            reduced += 2 * leaf.size * 4 * (mesh.size - 1) / mesh.size
    times = program.config.training.accumulation * (shares - 1) / shares
    return {"all-gather": times * gathered, "reduce-scatter": times * scattered, "all-reduce": reduced}


def decode_case(name: str, layers: int | None, card: Any) -> Traced:
    """The last chunk of steps of a case of `benchmarks.gpu.decode`, when the cache is nearly full."""
    shape_name, batch, prompt, new, int8 = decode.case_of(name)
    model = build(_cut(shape(shape_name, toy=False), layers), dtype=jnp.bfloat16)
    params = decode.abstract_weights(model, int8=int8)
    request = make_request(model, params, [[1] * prompt] * batch, max_new_tokens=new)
    inputs = request.decoder, request.settings
    context, state = jax.eval_shape(
        functools.partial(loop.begin, *inputs), params, request.tokens, request.lengths, request.keys
    )
    attended, _ = loop.read_lengths(request.settings.plan, request.settings.chunk)[-1]
    stopped = jax.ShapeDtypeStruct((batch,), bool)
    arguments = [place(tree, card) for tree in (params, context, state, stopped)]
    needed = decode.step_bytes(request, context, state, filled=attended)
    facts = {"state_gb": tree_bytes(state) / 1e9, "needed_gb": needed / 1e9}
    return Traced(loop.next_chunk.trace(*inputs, *arguments, attended), request.settings.chunk, facts)


def _cut(config: Any, layers: int | None) -> Any:
    if layers is None:
        return config
    both = {"num_decoder_layers": layers} if isinstance(config, T5Config) else {}
    return dataclasses.replace(config, num_layers=layers, **both)


def cases() -> list[str]:
    """Programs of run_gpu.sh that can be compiled."""
    return [*(f"train/{case}" for case in train.CASES), *(f"decode/{case}" for case in decode.CASES)]


def compile_case(
    name: str,
    overrides: Sequence[str] = (),
    *,
    layers: int | None = None,
    mesh: tuple[int, int] = (1, 1),
    card: str = "H200",
) -> dict[str, Any]:
    """Figures of one case or config file, its layers cut to `layers` of each stack, for each card of a mesh.

    `mesh` is (data, fsdp). Per step where one run takes several; decoding is for one device.
    """
    base, variants = split(name)
    part, case = name.split("/") if base in cases() else ("run", " ".join([name, *overrides]))
    options: dict[str, Any] = dict(_OPTIONS)
    for flag in (flag for variant in variants for flag in variant.flags):
        key, _, value = flag.partition("=")
        options[key] = _option(value)
    cards, sharding = devices_of(card, math.prod(mesh)), ShardingConfig(fsdp=mesh[1])
    with pretend_gpu():
        if part == "run":
            config = dataclasses.replace(load_config(ROOT / name, overrides), sharding=sharding)
            program = train_case(config, layers, cards)
        elif part == "train":
            of = train.case_of(case)
            config = dataclasses.replace(train.run_config(of, toy=False), sharding=sharding)
            program = train_case(config, layers, cards, lengths=of.lengths)
        else:
            program = decode_case(case, layers, cards[0])
        before = time.perf_counter()
        compiled = program.traced.lower().compile(compiler_options=options)
    seconds = time.perf_counter() - before
    memory, every = compiled.memory_analysis(), kernels(compiled.as_text())
    steps = program.steps
    # Moved outside matmuls: what fusion leaves to be read and written.
    outside = sum(kernel.times * kernel.bytes for kernel in every if not kernel.product)
    return {
        "part": part,
        "case": case,
        "compile_seconds": round(seconds, 1),
        "argument_gb": memory.argument_size_in_bytes / 1e9,
        "aliased_gb": memory.alias_size_in_bytes / 1e9,
        "temporary_gb": memory.temp_size_in_bytes / 1e9,
        "usable_gb": CARDS[card].usable / 1e9,
        "kernels": sum(kernel.times for kernel in every) / steps,
        "products": sum(kernel.times for kernel in every if kernel.product) / steps,
        "gflops": sum(kernel.times * kernel.flops for kernel in every) / steps / 1e9,
        "moved_gb": sum(kernel.times * kernel.bytes for kernel in every) / steps / 1e9,
        "moved_outside_products_gb": outside / steps / 1e9,
        "copied_gb": sum(map(_copied, every)) / steps / 1e9,
        "collectives": _collectives(every),
        "fused_attention_heads": sorted({dimensions(kernel.shape)[-1] for kernel in every if kernel.attention}),
        **program.facts,
    }


def _option(value: str) -> Any:
    """A flag's value in the type that jax's compiler options take."""
    if value in ("true", "false"):
        return value == "true"
    return int(value) if value.lstrip("-").isdigit() else value


def _collectives(every: list[Kernel]) -> dict[str, dict[str, float]]:
    """For each kind of communication how often it runs, gigabytes that a device gets, and how many overlap matmuls."""
    found: dict[str, dict[str, float]] = {}
    for kernel in (kernel for kernel in every if kernel.collective and kernel.devices > 1):
        row = found.setdefault(kernel.collective, {"count": 0, "gb": 0.0, "overlapped": 0})
        row["count"] += kernel.times
        row["gb"] += kernel.times * kernel.received / 1e9
        row["overlapped"] += kernel.times * kernel.overlapped
    return found


def _copied(kernel: Kernel) -> int:
    return kernel.times * nbytes(kernel.shape) if kernel.operation.startswith("copy") else 0


def table(document: dict[str, Any]) -> str:
    """One row per case, with what the compiler's figures are to be compared with."""
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    lines = [f"For an H200, by XLA's GPU compiler on a machine without one ({versions}); nothing was run:", ""]
    lines += ["| program | memory | kernels | moved | |", "| --- | --- | --- | --- | --- |"]
    for each in document["results"]:
        memory = each["argument_gb"] + each["temporary_gb"]
        if each["part"] != "decode":
            estimate, products = each["estimated_gb"], each["gflops"] / each["needed_gflops"]
            moved = f"{each['moved_outside_products_gb']:.0f} GB outside matmuls"
            other = f"estimate {estimate:.0f} GB; {products:.2f}x the matmuls of forward and backward"
        else:
            moved = f"{each['moved_gb']:.2f} GB, {each['moved_gb'] / each['needed_gb']:.2f}x weights and cache"
            other = f"{1000 * each['temporary_gb']:.1f} MB next to weights and state"
        row = f"{each['part']} {each['case']} | {memory:.1f} GB | {each['kernels']:.0f} | {moved} | {other}"
        lines.append(f"| {row} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Compiles what the command line names and prints, and writes, what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="of run_gpu.sh, or a run's YAML file; all without any")
    parser.add_argument("--layers", type=int, help="cut every stack to so many layers")
    parser.add_argument(
        "--mesh", type=_mesh, default=(1, 1), metavar="data=8,fsdp=8", help="train on it, see jaxllm.training.sharding"
    )
    parser.add_argument("--card", choices=CARDS, default="H200", help="that the programs are compiled for")
    parser.add_argument("--write", action="store_true", help=f"to {GUIDE.name} and {RESULTS.name}")
    options = parser.parse_args(arguments)
    overrides = [word for word in options.cases if "=" in word]
    named = [word for word in options.cases if word not in overrides]
    files = [name for name in named if (ROOT / name).is_file()]
    if unknown := {name for name in named if split(name)[0] not in (*files, *cases())}:
        parser.error(f"no case or file {', '.join(sorted(unknown))}; cases are {', '.join(cases())}")
    if overrides and (files != named or not files):
        parser.error(f"{', '.join(overrides)}: settings are of a run's file, such as configs/t5_large.yaml")
    several = options.mesh != (1, 1)
    if several and any(name.startswith("decode/") for name in named or cases()):
        parser.error("--mesh: decoding is for one; name train cases or a run's file")
    if options.write and (named or options.layers or several or options.card != "H200"):
        parser.error("--write keeps the figures of all programs, as they are, for an H200")
    results = []
    for name, settings in [(name, overrides) for name in named] or _everything():
        results.append(compile_case(name, settings, layers=options.layers, mesh=options.mesh, card=options.card))
        print(json.dumps(results[-1]), flush=True)
    if options.write:
        versions = {package: importlib.metadata.version(package) for package in ("jax", "jaxlib", "flax")}
        document = {"device": "NVIDIA H200, described, not present", "versions": versions, "results": results}
        RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        GUIDE.write_text(insert(GUIDE.read_text(encoding="utf-8"), table(document), MARKERS), encoding="utf-8")


def _mesh(text: str) -> tuple[int, int]:
    """Copies, and devices that share one; `data=1` may be left out."""
    sizes = {name: int(size) for name, _, size in (part.partition("=") for part in text.split(","))}
    if unknown := sizes.keys() - {"data", "fsdp"}:
        raise ValueError(f"no axis {', '.join(unknown)}")
    return sizes.get("data", 1), sizes.get("fsdp", 1)


def _everything() -> list[tuple[str, list[str]]]:
    real = sorted(f"configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml") if "tiny" not in path.stem)
    compared = [("configs/t5_large.yaml", [setting]) for setting in ("model.layers=scan", "model.remat=none")]
    return [*((name, []) for name in real), *compared, *((name, []) for name in cases())]


if __name__ == "__main__":
    sys.path.append(str(COMPILER))  # before jax looks for its plugins, which then looks for no CUDA
    jax.config.update("jax_platforms", "cpu")
    main()
