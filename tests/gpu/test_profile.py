"""The reader of traces: a real one of XLA:CPU, and one written by hand as a GPU's looks."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from benchmarks.gpu import decode, profile, train
from benchmarks.gpu.profile import record, show
from jaxllm.run.profile import kernels, kind, sources
from tests.gpu.test_benchmark import result


def event(name: int, start: int, duration: int, *stats: tuple[int, int]) -> str:
    """Of a trace in text; times in microseconds, stats as (key, value) by number."""
    told = " ".join(f"stats {{ metadata_id: {key} ref_value: {value} }}" for key, value in stats)
    return f"events {{ metadata_id: {name} offset_ps: {start}000000 duration_ps: {duration}000000 {told} }}"


# Two steps on two streams: each a matmul of 40 us, a fusion of 20 us in two layers, and a gap of 20 us between steps.
# A copy overlaps with a matmul. The line of derived steps, and the host, are not kernels.
GPU = f"""
planes {{
  name: "/device:GPU:0"
  lines {{ name: "Stream #13(Compute)"
    {event(1, 0, 40, (1, 11))} {event(2, 40, 10, (1, 12), (2, 21))} {event(2, 50, 10, (1, 13), (2, 22))}
    {event(1, 80, 40, (1, 11))} {event(2, 120, 10, (1, 12), (2, 21))} {event(2, 130, 10, (1, 13), (2, 22))}
  }}
  lines {{ name: "Stream #14(MemcpyD2D)" {event(3, 10, 5)} {event(3, 90, 5)} }}
  lines {{ name: "Steps" {event(1, 0, 140)} }}
  event_metadata {{ key: 1 value {{ id: 1 name: "sm90_xmma_gemm_bf16" }} }}
  event_metadata {{ key: 2 value {{ id: 2 name: "loop_fusion" }} }}
  event_metadata {{ key: 3 value {{ id: 3 name: "MemcpyD2D" }} }}
  stat_metadata {{ key: 1 value {{ id: 1 name: "hlo_op" }} }}
  stat_metadata {{ key: 2 value {{ id: 2 name: "name" }} }}
  stat_metadata {{ key: 11 value {{ id: 11 name: "custom-call.7" }} }}
  stat_metadata {{ key: 12 value {{ id: 12 name: "loop_fusion.1" }} }}
  stat_metadata {{ key: 13 value {{ id: 13 name: "loop_fusion.2" }} }}
  stat_metadata {{ key: 21 value {{ id: 21 name: "jit(step)/layers/0/mul" }} }}
  stat_metadata {{ key: 22 value {{ id: 22 name: "jit(step)/layers/1/mul" }} }}
}}
planes {{ name: "/host:CPU" lines {{ name: "python" {event(1, 0, 999)} }}
  event_metadata {{ key: 1 value {{ id: 1 name: "PjitFunction" }} }} }}
"""
PROGRAM = '  %custom-call.7 = bf16[8] custom-call(%a), metadata={op_name="jit(step)/layers/3/dot_general" id=1}\n'


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    folder = tmp_path / "plugins" / "profile" / "now"
    folder.mkdir(parents=True)
    (folder / "host.xplane.pb").write_bytes(ProfileData.text_proto_to_serialized_xspace(GPU))
    return tmp_path


def test_a_gpus_kernels_are_added_up_by_kind_and_named_by_their_operation(trace: Path) -> None:
    found = kernels(trace, 2, program=PROGRAM)
    product, fusion, copied = found.kernels
    assert (product.name, product.where) == ("custom-call", "jit(step)/layers/*/dot_general")
    assert (product.milliseconds, product.calls) == pytest.approx((0.040, 1))
    assert (fusion.name, fusion.where, fusion.calls) == ("loop_fusion", "jit(step)/layers/*/mul", 2)
    assert fusion.milliseconds == pytest.approx(0.020) and copied.name == "MemcpyD2D"
    assert sum(each.fraction for each in found.kernels) == pytest.approx(1)
    # 140 us from the first kernel to the last for two steps, 20 of them with none.
    assert found.step_milliseconds == pytest.approx(0.070) and found.busy == pytest.approx(120 / 140)


def test_a_kernel_of_a_cuda_graph_has_its_own_name(tmp_path: Path) -> None:
    text = GPU.replace('name: "custom-call.7"', 'name: "command_buffer.1"')
    (tmp_path / "host.xplane.pb").write_bytes(ProfileData.text_proto_to_serialized_xspace(text))
    assert kernels(tmp_path, 2, program=PROGRAM).kernels[0].name == "sm90_xmma_gemm_bf16"


def test_the_table_shows_the_largest_and_the_files_hold_all(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = kernels(trace, 2)
    assert len(found.table(1).splitlines()) == 2
    monkeypatch.setenv("OUT", str(tmp_path))
    for case in ("a", "b"):
        show("train", case, found)
    shown = capsys.readouterr().out
    assert "profile of train/a, traced without CUDA graphs: 0.070 ms a step, 85.7% of it in kernels" in shown
    rows = [json.loads(line) for line in (tmp_path / "profiles.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["case"] for row in rows] == ["a", "b"] and len(rows[0]["kernels"]) == 3
    assert (tmp_path / "profiles.txt").read_text(encoding="utf-8").count("custom-call") == 2


def test_a_real_trace_of_a_cpu() -> None:
    step = jax.jit(lambda x: jnp.tanh(x @ x)).lower(jnp.ones((256, 256))).compile()

    def run(count: int) -> None:
        for _ in range(count):
            step(jnp.ones((256, 256))).block_until_ready()

    run(1)
    found = record(run, steps=3, program=step.as_text())
    assert 0 < found.busy <= 1 and found.step_milliseconds > 0
    assert any(each.calls == 1 and "dot_general" in each.where for each in found.kernels)


def test_numbers_are_not_part_of_a_kind() -> None:
    names = (
        "loop_add_fusion_3",
        "fusion.12",
        "gemm_fusion_dot_23_0",
        "wrapped_convert.1.clone",
        "MemcpyD2D",
        "sm90_f16",
    )
    assert [kind(name) for name in names] == [
        *("loop_add_fusion", "fusion", "gemm_fusion_dot", "wrapped_convert.1.clone", "MemcpyD2D", "sm90_f16")
    ]
    assert sources(PROGRAM) == dict.fromkeys(("custom-call.7", "custom-call_7"), "jit(step)/layers/3/dot_general")


def test_a_folder_without_a_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no trace"):
        kernels(tmp_path, 1)


def test_a_profile_that_fails_costs_no_case() -> None:
    def broken(count: int) -> None:
        raise RuntimeError(f"no {count} steps")

    assert profile.traced("train", "a", broken, steps=2, seconds=1.0) == {"profile_error": "RuntimeError: no 2 steps"}


@pytest.mark.parametrize(("module", "case"), [(train, "llama_1b"), (decode, "1b_b1")])
def test_a_case_is_profiled(
    module: object, case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    module.main(case, toy=True, profile=True)
    measured = result(capsys)
    median = measured["seconds"]["median"]
    assert 0 < measured["kernel_ms"] <= measured["traced_step_ms"]
    assert measured["device_busy"] == pytest.approx(measured["kernel_ms"] / 1e3 / median)
    assert (tmp_path / "profiles.jsonl").exists() and profile.SHOWN == 40
