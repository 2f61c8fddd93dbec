"""The GPU benchmark's dry run: the same programs at toy sizes, so that they work when a GPU is at hand."""

from __future__ import annotations

import json
import re
import time
import tomllib
from pathlib import Path

import pytest

from benchmarks.gpu import baseline, ceilings, decode, pretrain, run, table, train
from benchmarks.gpu.common import RESULT
from jaxllm.config_file import load_config

ROOT = Path(__file__).parent.parent.parent
NOT_CARRIED = ("pyarrow", "matplotlib")


def result(capsys: pytest.CaptureFixture[str]) -> dict:
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(RESULT)]
    return json.loads(lines[-1].removeprefix(RESULT))


def test_ceilings_and_a_decode_case(capsys: pytest.CaptureFixture[str]) -> None:
    for case in ("matmul", "copy"):
        ceilings.main(case, toy=True)
        assert result(capsys)["seconds"]["median"] > 0
    for case in ("1b_b8", "t5_large_b8"):
        decode.main(case, toy=True)
        measured = result(capsys)
        assert measured["tokens_per_second"] > 0 and measured["read_gb_per_step"] > 0


def test_a_train_case(capsys: pytest.CaptureFixture[str]) -> None:
    train.main("t5_large_fp16", toy=True)
    measured = result(capsys)
    assert measured["last_loss"] < measured["first_loss"]  # one batch, again and again
    assert measured["estimated_gb"] >= measured["temporary_gb"]


def test_real_pretraining_reads_the_standard_library(capsys: pytest.CaptureFixture[str]) -> None:
    pretrain.main("llama_bf16", toy=True)
    assert result(capsys)["steps"] >= 4
    config = train.run_config(pretrain.RUNS["t5_bf16"], toy=False)
    batch = next(pretrain.t5_batches(config))
    assert batch["encoder_tokens"].shape == (128, 512) and batch["decoder_tokens"].shape == (128, 114)
    assert (batch["encoder_lengths"] == 512).all()


def test_the_script_is_run_with_settings_that_it_knows_and_needs_only_what_is_carried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NOT_CARRIED:
        missing = f"raise ModuleNotFoundError('No module named {name}')\n"
        (tmp_path / f"{name}.py").write_text(missing, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in pretrain.SCRIPTS:
        for toy in (True, False):
            folder = tmp_path / f"{name}_{toy}"
            folder.mkdir()
            file, *overrides = pretrain.script_arguments(name, str(folder), toy=toy)
            assert load_config(file, overrides).precision.compute == "bfloat16"
    pretrain.main("script_llama", toy=True)
    measured = result(capsys)
    assert measured["step"] == 5 and measured["bits_per_byte"] > 0


def test_a_case_that_hangs_ends_with_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "mark"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    monkeypatch.setattr(run, "_TESTS", ["-c", parent])
    assert "more than 1 s" in run.run_case("tests/gpu", toy=False, limit=1, environment={})["error"]
    time.sleep(2.5)
    assert not mark.exists()


def test_what_a_machine_without_a_network_lacks_is_carried() -> None:
    """The packages of a run are either there with jax, flax, orbax and transformers, or in carry.sh's list."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    there = {"jax", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers", "safetensors", "pyyaml", "rich"}
    carried = (ROOT / "benchmarks" / "gpu" / "carry.sh").read_text(encoding="utf-8")
    assert all(name in carried for name in NOT_CARRIED)  # its head says so
    names = [re.split(r"[>=<\[; ]", entry)[0].lower() for entry in project["dependencies"]]
    words = set(re.split(r"\s+|==[\d.]+", carried.replace("_", "-")))
    assert not [name for name in names if name not in {*there, *NOT_CARRIED} and name.replace("_", "-") not in words]
    assert {"cuda12", "cuda13"} <= set(project["optional-dependencies"])


def test_every_group_holds_its_ten_minutes_and_every_program_is_in_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cases = ["tests/gpu", "ceilings/matmul", "ceilings/copy"]
    for module in (train, decode, baseline, pretrain):
        cases += [f"{module.__name__.split('.')[-1]}/{case}" for case in module.CASES]
    grouped = [case for group in run.GROUPS.values() for case in group]
    assert sorted(grouped) == sorted(cases)
    assert max(sum(map(run.planned, group)) for group in run.GROUPS.values()) <= run.BUDGET
    # Three minutes of training, and what begins and ends them.
    assert all(run.PLAN[part] < run._LIMITS[part] for part in run.PLAN) and run.PLAN["pretrain"] >= 180 + 60
    assert run.cases_of("decode/1b_b") == ["decode/1b_b1", "decode/1b_b8", "decode/1b_b64", "decode/1b_b1_8k"]
    assert run.main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*run.GROUPS, *cases)) and "minutes_bf16: 8.0 minutes" in shown


def test_a_budget_leaves_out_what_does_not_fit_and_ends_what_takes_longer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, float] = {}

    def run_case(name: str, *, limit: float, **_: object) -> dict:
        asked[name] = limit
        return dict(zip(("part", "case"), name.split("/"), strict=True))

    monkeypatch.setattr(run, "run_case", run_case)
    monkeypatch.setattr(run, "_first_line", lambda command: "Some GPU")
    monkeypatch.setattr("jaxllm.training.device.accepted_flags", lambda flags: flags)
    names = ["pretrain/t5_bf16", "ceilings/copy", "baseline/t5_large_train"]
    assert run.run_all(names, toy=False, budget=200, out=tmp_path) == 0
    assert list(asked) == names[1:]
    assert asked["ceilings/copy"] == run._LIMITS["ceilings"] and 190 < asked["baseline/t5_large_train"] <= 200
    assert re.search(r"pretrain/t5_bf16 +left out: \d+ s remain of 200", capsys.readouterr().out)
    for arguments, count in (([], len(run.GROUPS["first"])), (["minutes_fp16"], 2), (["decode", "ceilings"], 14)):
        asked.clear()
        assert run.main([*arguments, "--out", str(tmp_path), "--budget=1000000"]) == 0
        assert len(asked) == count


def test_failures_are_survived(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        run.main(["decod/1b"])
    assert "no group or case begins with decod/1b" in capsys.readouterr().err
    good = {"tokens_per_second": 5.0, "mfu": 0.5, "peak_gb": 9.0}
    done = iter([{"error": "Traceback\nout of memory"}, good])
    monkeypatch.setattr(run, "run_case", lambda name, **_: {"part": "train", "case": name, **next(done)})
    monkeypatch.setattr(run, "_first_line", lambda command: "Some GPU")
    monkeypatch.setattr("jaxllm.training.device.accepted_flags", lambda flags: flags)
    code = run.main(["train/llama_1b", "--out", str(tmp_path), "--budget", "0.0"])
    assert code == 0  # everything skipped: no time
    assert run.run_all(["train/llama_1b", "train/llama_8b_8layers"], toy=False, budget=600, out=tmp_path) == 1
    document = json.loads((tmp_path / "gpu_Some_GPU.json").read_text())
    assert "out of memory" in capsys.readouterr().out
    text = table.table(document)
    assert "5 tokens/s | 50.0% MFU | 9.0 GB" in text
    begin, end = table.MARKERS
    readme = table.insert(f"before\n{begin}\nold\n{end}\nafter", text)
    assert readme.startswith("before") and readme.endswith("after") and "old" not in readme
    with pytest.raises(ValueError, match="put these two lines into it"):
        table.insert("nothing", text)
