"""The precision ledger finds no sum below float32 in either family, and would find one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxllm.config_file import parse_config
from jaxllm.models import abstract_params
from jaxllm.ops import norms
from jaxllm.training import ledger as ledger_module
from jaxllm.training.fit import abstract_batch
from jaxllm.training.ledger import ledger, train_step_ledger, violations
from jaxllm.training.loss import build_loss
from jaxllm.training.precision import build_model

ROOT = Path(__file__).parent.parent.parent
SIZES = {"vocab_size": 64, "d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2}
FAMILIES = {
    "llama": {"family": "llama", **SIZES, "qkv_bias": True, "qk_norm": True},
    "t5": {"family": "t5", **SIZES, "head_dim": 8, "dropout_rate": 0.1},
}


def run(family: str, compute: str, **precision: object):
    scale = {"loss_scale": "dynamic", "retries": 2} if compute == "float16" else {}
    objective = {"objective": "span_corruption"} if family == "t5" else {}
    return parse_config(
        {
            "model": FAMILIES[family],
            "precision": {"compute": compute, **scale, **precision},
            "data": {"sequence_length": 16, **objective},
            "training": {"batch_size": 4, "accumulation": 2},
        }
    )


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_sum_is_float32(family: str, compute: str) -> None:
    entries = train_step_ledger(run(family, compute))
    assert not violations(entries)
    kinds = {entry.kind for entry in entries}
    assert {"matmul", "reduction", "exp", "norm"} <= kinds and ("cast" in kinds) == (compute != "float32")
    products = [entry for entry in entries if entry.kind == "matmul"]
    assert {entry.accumulation for entry in products} == {"float32"}
    assert any(entry.inputs == compute for entry in products)
    # The islands: norms' roots, the softmax, logits and loss.
    assert {entry.inputs for entry in entries if entry.operation in ("rsqrt", "exp", "log")} == {"float32"}


def test_a_counted_operation_is_counted_over_layers_and_microbatches() -> None:
    entries = train_step_ledger(run("llama", "bfloat16"))
    found = {e.where: n for e, n in entries.items() if e.kind == "matmul" and "down_proj" in e.where}
    assert found == {"LlamaLayer/down_proj": 2 * 2, "LlamaLayer/down_proj (backward)": 2 * 2 * 2}


def test_a_planted_low_sum_is_found_and_may_be_excused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "rows_of", lambda vector, like: vector)  # what autodiff alone would do
    bad = violations(train_step_ledger(run("llama", "bfloat16")))
    assert bad and all("norm" in entry.where and entry.operation == "reduce_sum" for entry in bad)
    monkeypatch.setitem(ledger_module.ALLOWED, ("norm", "reduce_sum"), "a test")
    assert not violations(train_step_ledger(run("llama", "bfloat16")))


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
    config = run(family, compute, residual=residual)
    loss = build_loss(build_model(config), config.training)
    params, batch = abstract_params(build_model(config)), abstract_batch(config, rows=2)
    traced = jax.make_jaxpr(lambda p, b: loss(p, b, None).loss)(params, batch)
    stacks = [eqn for eqn in traced.jaxpr.eqns if eqn.primitive.name == "scan" and eqn.params["length"] == 2]
    assert stacks and {str(eqn.outvars[0].aval.dtype) for eqn in stacks} == {want}


def test_the_script_prints_the_table_and_its_verdict() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "precision_ledger.py"), str(ROOT / "configs" / "llama_tiny.yaml")]
    done = subprocess.run([*command, "precision.compute=bfloat16"], capture_output=True, text=True, check=True)
    assert "0 summed below float32" in done.stdout and "matmul" in done.stdout
    wrong = subprocess.run([*command, "precision.compute=int8"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "error:" in wrong.stderr
