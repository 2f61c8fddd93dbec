"""The probe's facts at toy sizes, what its verdicts change, and that a failing fact stops nothing."""

from __future__ import annotations

import functools
import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu import attention_calls, probe
from benchmarks.gpu.attention_calls import (
    ATTENTION,
    SUSPECTS,
    Prepared,
    attend,
    change,
    checked,
    operands,
    passes,
    row_of,
    small,
    timed,
    verdict,
)
from jaxllm.ops.cudnn import AVOIDED
from tests.structure.programs import pretend_gpu

REFUSED = "INTERNAL: No valid engine configs for Matmul_MUL_Matmul_ in cuda_dnn.cc: 'graph_.create_execution_plans'"
SHOWN = ("t5_encoder", "negative_bias_320", "prefill_16")


def lines(folder: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "probe.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["case"]: row for row in rows}


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Some of the facts, and the folder that they go to."""
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(probe, "ATTENTION", {name: ATTENTION[name] for name in SHOWN})
    monkeypatch.setattr(probe, "PRODUCTS", probe.PRODUCTS[:1])
    return tmp_path


def test_facts_are_printed_and_kept_and_a_failure_stops_nothing(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*, toy: bool) -> dict[str, Any]:
        raise RuntimeError("no copy")

    monkeypatch.setattr(probe, "copy", broken)
    probe.main(toy=True)
    found = lines(out)
    assert list(found) == ["machine", "sustained", "copy", *SHOWN, "product_8192x8192x8192_bfloat16"]
    assert all(found[name]["verdict"] == "right" and found[name]["finite"] for name in SHOWN)
    assert set(found["t5_encoder"]["errors"]) == {"output", "query", "key", "value", "bias"}
    assert set(found["prefill_16"]["errors"]) == {"output"}
    assert found["copy"]["error"] == "RuntimeError: no copy" and found["sustained"]["tflops"] > 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(found) and all(line.startswith("RESULT ") for line in printed)


def test_a_compilation_is_given_the_shapes_alone() -> None:
    for name in ("negative_bias_320", "t5_decoder"):
        drawn, empty = operands(ATTENTION[name], ragged=True), operands(ATTENTION[name], ragged=True, empty=True)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), drawn) == jax.tree.map(lambda x: (x.shape, x.dtype), empty)


def test_a_time_is_that_of_the_best_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of 10 ms, and one group during which another thread had the interpreter."""
    clock, runs = [0.0], iter(range(100))

    def run() -> None:
        clock[0] += 0.5 if next(runs) == 5 else 0.01

    monkeypatch.setattr(attention_calls.time, "perf_counter", lambda: clock[0])
    assert timed(run) == pytest.approx(0.01) and next(runs) == 2 + 6 * 2


def test_a_clock_ends_it(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "SECONDS", -1.0)
    probe.main(toy=True)
    assert {row["verdict"] for row in lines(out).values()} == {"left out"}


def test_every_class_of_calls_is_probed() -> None:
    rows = {name: row_of(case).name for name, case in ATTENTION.items()}
    assert {row.name for row in (*AVOIDED, *SUSPECTS)} == set(rows.values())
    assert rows["negative_bias_320"] == "bias, 64 keys beyond a multiple of 128"
    assert rows["t5_encoder"] == rows["t5_prefill"] == "bias and lengths" and rows["llama_1b"] == "all calls"
    assert all(not case.compare or case.compare in ATTENTION for case in ATTENTION.values())


def test_the_comparison_is_of_the_same_class() -> None:
    """A smaller call must not take another path inside cuDNN."""
    for case in ATTENTION.values():
        assert row_of(checked(case)).name.split(" beyond a head")[0] in row_of(case).name


def test_every_call_lowers_to_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """What jax itself would refuse is found here; cuDNN's own answer needs a GPU."""
    pretend_gpu(monkeypatch)
    for name, case in ATTENTION.items():
        fewer = checked(case)
        traced = jax.jit(functools.partial(passes, fewer, "cudnn")).trace(operands(fewer, ragged=True))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("@__cudnn$fmha") == 1 + case.trained, name


def given(want: list[np.ndarray], ours: Any) -> Future[Prepared]:
    ready: Future[Prepared] = Future()
    ready.set_result(Prepared(want, lambda _: ours, lambda *_: ours[0], lambda _: ours, attention_calls._finite, 0.0))
    return ready


def test_wrong_values_refusals_and_slow_calls_name_the_row_they_change() -> None:
    case = ATTENTION["t5_encoder"]
    row, toy = row_of(case), small(case)
    want = attention_calls.exact(checked(toy))
    ours = [jnp.asarray(x) for x in want]
    assert attend(toy, given(want, ours), row)["verdict"] == "right"
    for fault in (lambda x: x * 1.02, lambda x: x.at[0].set(jnp.nan)):
        bad = attend(toy, given(want, [*ours[:4], fault(ours[4])]), row)
        assert bad["verdict"] == "wrong"
        assert (
            bad["change"].endswith("into AVOIDED of jaxllm/ops/cudnn.py, so that it takes blocks")
            and "'bias and lengths'" in bad["change"]
        )
    refused: Future[Prepared] = Future()
    refused.set_exception(jax.errors.JaxRuntimeError(REFUSED))
    assert attend(toy, refused, row)["verdict"] == "refused"
    speed = {"forward_tflops": 300.0, "backward_tflops": 90.0}
    assert verdict(case, {"output": 0.0}, speed, finite=True) == "slow"
    assert change(case, "slow", row).startswith("compare with t5_encoder_nolengths")


def test_strongly_negative_scores_are_judged_by_being_finite_and_may_end_a_row() -> None:
    case = ATTENTION["negative_bias_320"]
    query, key = (x.astype(np.float32) for x in operands(case).inputs[:2])
    scores = np.einsum("bthd,bshd->bhts", query, key) * case.width**-0.5
    assert scores.max() < -88.8 - np.log(320)
    errors, speed = {"query": 0.5}, {"forward_tflops": 1.0, "backward_tflops": 1.0}
    assert (
        verdict(case, errors, speed, finite=True) == "right" and verdict(case, errors, speed, finite=False) == "wrong"
    )
    row = row_of(case)
    assert change(case, "right", row).endswith("not for this cuDNN")
    assert change(case, "wrong", row) == "none: the row is avoided"
