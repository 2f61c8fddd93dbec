"""The GPU benchmark's dry run: the same programs at toy sizes, so that they work when a GPU is at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gpu import ceilings, decode, pretrain, run, table, train
from benchmarks.gpu.common import RESULT


def result(capsys: pytest.CaptureFixture[str]) -> dict:
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(RESULT)]
    return json.loads(lines[-1].removeprefix(RESULT))


def test_ceilings_and_a_decode_case(capsys: pytest.CaptureFixture[str]) -> None:
    for case in ("matmul", "copy"):
        ceilings.main(case, toy=True)
        assert result(capsys)["seconds"]["median"] > 0
    decode.main("1b_b8", toy=True)
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
    assert (batch["encoder_segment_ids"] > 0).mean() > 0.9


def test_every_case_has_a_program_and_failures_are_survived(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run.main(["--list"]) == 0
    names = capsys.readouterr().out.split()
    assert {name.split("/")[0] for name in names} == set(run.PARTS)
    done = iter([{"error": "Traceback\nout of memory"}, {"tokens_per_second": 5.0, "mfu": 0.5, "peak_gb": 9.0}])
    monkeypatch.setattr(run, "run_case", lambda name, **_: {"part": "train", "case": name, **next(done)})
    monkeypatch.setattr(run, "_first_line", lambda command: "Some GPU")
    monkeypatch.setattr("jaxllm.training.device.accepted_flags", lambda flags: flags)
    code = run.main(["train/llama_1b", "--out", str(tmp_path), "--budget", "0.0"])
    assert code == 0  # everything skipped: no time
    first, second = names[names.index("train/llama_1b")], names[names.index("train/llama_8b_8layers")]
    assert run.run_all([first, second], toy=False, budget=60, out=tmp_path) == 1
    document = json.loads((tmp_path / "gpu_Some_GPU.json").read_text())
    assert "out of memory" in capsys.readouterr().out
    text = table.table(document)
    assert "5 tokens/s | 50.0% MFU | 9.0 GB" in text
    readme = table.insert(f"before\n{table.BEGIN}\nold\n{table.END}\nafter", text)
    assert readme.startswith("before") and readme.endswith("after") and "old" not in readme
    with pytest.raises(ValueError, match="put these two lines into it"):
        table.insert("nothing", text)
