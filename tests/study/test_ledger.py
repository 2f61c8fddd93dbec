"""The precision ledger finds no sum below float32 in either family, and would find one."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxllm.config import PrecisionConfig, RunConfig
from jaxllm.config.file import parse_config
from jaxllm.models import abstract_params
from jaxllm.ops import pointwise
from jaxllm.study.ledger import Entry, allowed, ledger, train_step_ledger, violations
from jaxllm.training.loss import build_loss
from jaxllm.training.precision import build_model
from jaxllm.training.program import program_of

ROOT = Path(__file__).parent.parent.parent
SIZES = {"vocab_size": 64, "d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2}
FAMILIES = {
    "llama": {"family": "llama", **SIZES, "qkv_bias": True, "qk_norm": True},
    "t5": {"family": "t5", **SIZES, "head_dim": 8, "dropout_rate": 0.1},
}


def run(family: str, compute: str, **precision: object) -> RunConfig:
    scale = {"loss_scale": "dynamic"} if compute == "float16" else {}
    objective = {"objective": "span_corruption"} if family == "t5" else {}
    return parse_config(
        {
            "model": FAMILIES[family],
            "precision": {"compute": compute, **scale, **precision},
            "data": {"sequence_length": 16, **objective},
            "training": {"batch_size": 4, "accumulation": 2},
        }
    )


@functools.cache
def entries_of(family: str, compute: str, **islands: str) -> Counter[Entry]:
    """The ledger of a run; several tests read the same ones."""
    return train_step_ledger(run(family, compute, islands=islands))


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_sum_is_float32(family: str, compute: str) -> None:
    entries = entries_of(family, compute)
    assert not violations(entries)
    kinds = {entry.kind for entry in entries}
    assert {"matmul", "reduction", "exp", "norm"} <= kinds and ("cast" in kinds) == (compute != "float32")
    products = [entry for entry in entries if entry.kind == "matmul"]
    assert {entry.accumulation for entry in products} == {"float32"}
    assert any(entry.inputs == compute for entry in products)
    # The islands: norms' roots, the softmax, logits and loss.
    assert {entry.inputs for entry in entries if entry.operation in ("rsqrt", "exp", "log")} == {"float32"}


def test_a_counted_operation_is_counted_over_layers_and_microbatches() -> None:
    entries = entries_of("llama", "bfloat16")
    found = {e.where: n for e, n in entries.items() if e.kind == "matmul" and "down_proj" in e.where}
    assert found == {"LlamaLayer/down_proj": 2 * 2, "LlamaLayer/down_proj (backward)": 2 * 2 * 2}


def test_a_planted_low_sum_is_found_and_may_be_excused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise, "rows_of", lambda vector, like: vector)  # what autodiff alone would do
    bad = violations(train_step_ledger(run("llama", "bfloat16")))
    assert bad and all("norm" in entry.where and entry.operation == "reduce_sum" for entry in bad)
    assert not violations(train_step_ledger(run("llama", "bfloat16")), [("norms", "reduce_sum")])


def test_a_moved_bias_excuses_no_sum_of_a_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run("t5", "bfloat16", islands={"relative_bias": "bfloat16"})
    monkeypatch.setattr(pointwise, "rows_of", lambda vector, like: vector)
    bad = violations(train_step_ledger(config), allowed(config.precision))
    assert {entry.where.split("/")[0] for entry in bad} == {"encoder", "decoder"}
    assert all(entry.where.endswith("_norm/norms (backward)") for entry in bad)


@pytest.mark.parametrize(
    ("island", "operation", "where"),
    [
        ("logits", "exp", "step"),
        ("relative_bias", "reduce_sum", "encoder (backward)"),
        ("relative_bias", "reduce_sum", "decoder/DecoderLayer/attention/relative_bias_free (backward)"),
        ("softmax", "exp", "LlamaLayer/softmaxed"),
        ("norms", "reduce_sum", "step/normal"),
        ("norms", "reduce_sum", "LlamaLayer/attn_norm"),
    ],
)
def test_an_island_excuses_its_own_scope_alone(island: str, operation: str, where: str) -> None:
    entry = Entry("reduction", operation, where, *["bfloat16"] * 3)
    assert violations(Counter([entry]), allowed(PrecisionConfig(islands={island: "bfloat16"}))) == [entry]


def inputs(operation: str, where: str = ""):
    """The dtypes in which an operation runs at places named so."""
    return lambda entries: {e.inputs for e in entries if e.operation == operation and where in e.where}


# Island -> what shows its dtype in a ledger, its default under bfloat16, and another.
MOVES = [
    ("llama", "norms", inputs("rsqrt"), "float32", "bfloat16"),
    ("t5", "norms", inputs("rsqrt", "norm"), "float32", "float16"),
    ("llama", "softmax", inputs("exp", "softmax"), "float32", "bfloat16"),
    ("t5", "softmax", inputs("exp", "softmax"), "float32", "bfloat16"),
    ("t5", "relative_bias", inputs("reduce_sum", "coder/relative_bias (backward)"), "float32", "bfloat16"),
]


@pytest.mark.parametrize(("family", "island", "seen", "default", "other"), MOVES)
def test_an_island_can_be_moved_and_nothing_else_moves(
    family: str, island: str, seen, default: str, other: str
) -> None:
    moved = run(family, "bfloat16", islands={island: other})
    entries, plain = entries_of(family, "bfloat16", **{island: other}), entries_of(family, "bfloat16")
    assert (seen(plain), seen(entries)) == ({default}, {other})
    assert violations(entries) and not violations(entries, allowed(moved.precision))
    for shows in (row[2] for row in MOVES if row[0] == family and row[1] != island):
        assert shows(entries) == shows(plain)


def test_logits_may_wait_in_bfloat16_and_nothing_is_computed_in_it() -> None:
    """Only their storage moves: the ledger shows a cast after the matmul, and exponentials and sums in float32."""
    entries, plain = entries_of("llama", "bfloat16", logits="bfloat16"), entries_of("llama", "bfloat16")
    casts = {(e.inputs, e.output) for e in entries - plain}
    assert casts == {("float32", "bfloat16"), ("bfloat16", "float32")} and all(
        e.kind == "cast" for e in entries - plain
    )
    assert not violations(entries)


def test_t5s_mlp_output_can_be_moved_both_ways() -> None:
    """To float32, the residual stream's, under bfloat16, and to float16 under float16, right after its sum."""

    def casts(compute: str, **islands: str) -> bool:
        entries = entries_of("t5", compute, **islands)
        assert not violations(entries)
        return any(e.kind == "cast" and e.where.endswith("mlp/down_proj") and e.output == compute for e in entries)

    assert casts("bfloat16") and not casts("bfloat16", mlp_output="float32")
    assert casts("float16", mlp_output="float16") and not casts("float16")


@pytest.mark.parametrize("family", FAMILIES)
def test_islands_named_with_their_defaults_are_the_same_program(family: str) -> None:
    own = {"llama": ("rope",), "t5": ("relative_bias",)}[family]
    islands = dict.fromkeys(("norms", "softmax", "logits", *own), "float32")
    islands |= {"residual": "bfloat16"} | ({"mlp_output": "bfloat16"} if family == "t5" else {})
    assert entries_of(family, "bfloat16", **islands) == entries_of(family, "bfloat16")


def test_a_product_that_returns_low_precision_counts_as_a_low_sum() -> None:
    x = jnp.ones((4, 4), jnp.bfloat16)
    (entry,) = violations(ledger(jax.make_jaxpr(jnp.matmul)(x, x).jaxpr))
    assert (entry.kind, entry.accumulation) == ("matmul", "bfloat16")


@pytest.mark.parametrize(
    ("family", "compute", "residual", "want"),
    [
        ("llama", "bfloat16", None, "bfloat16"),
        ("llama", "bfloat16", "float32", "float32"),
        ("t5", "float16", None, "float32"),
        ("t5", "float16", "float16", "float16"),
    ],
)
def test_the_residual_stream_has_a_switch(family: str, compute: str, residual: str | None, want: str) -> None:
    config = run(family, compute, islands={"residual": residual} if residual else {})
    loss = build_loss(build_model(config), config.training)
    params, batch = abstract_params(build_model(config)), program_of(config).abstract_batch(2)
    traced = jax.make_jaxpr(lambda p, b: loss(p, b, None).loss)(params, batch)
    stacks = [eqn for eqn in traced.jaxpr.eqns if eqn.primitive.name == "scan" and eqn.params["length"] == 2]
    assert stacks and {str(eqn.outvars[0].aval.dtype) for eqn in stacks} == {want}


def test_the_script_prints_the_table_and_its_verdict() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "precision_ledger.py"), str(ROOT / "configs" / "llama_tiny.yaml")]
    done = subprocess.run([*command, "precision.compute=bfloat16"], capture_output=True, text=True, check=True)
    assert "0 below float32" in done.stdout and "matmul" in done.stdout
    # cuDNN's kernel cannot run in float32
    for setting in ("precision.compute=int8", "model.attention=cudnn", "--precision.compute=bfloat16"):
        wrong = subprocess.run([*command, setting], capture_output=True, text=True, check=False)
        assert wrong.returncode == 2 and wrong.stderr.startswith("error:") and "Traceback" not in wrong.stderr
