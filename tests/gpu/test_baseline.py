"""The baseline on torch: which of its forms counts, what survives a failure, and that a fast form computes the same."""

from __future__ import annotations

import copy
import functools
import io
import json
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from benchmarks.gpu import baseline, run
from benchmarks.gpu.baseline import Form
from benchmarks.report import RESULT
from benchmarks.shapes import shape

OURS = {"tokens_per_second": 90.0, "sequences_per_second": 90.0, "seconds": {"median": 1.0}, "wall": 1.0}


def results(text: str) -> list[dict]:
    return [json.loads(line.removeprefix(RESULT)) for line in text.splitlines() if line.startswith(RESULT)]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch):
    """Puts a function of a form in the place of torch, and a constant in ours."""
    tried: list[Form] = []

    def use(rate) -> list[Form]:
        def process(module: str, *arguments: str, limit: float = 0.0) -> dict:
            if module.endswith("run"):
                return dict(OURS)
            form = {key: value for key, value in json.loads(arguments[1]).items() if key in Form._fields}
            tried.append(Form(**form))
            return {"wall": 1.0, "versions": {}, **rate(tried[-1])}

        monkeypatch.setattr(baseline, "_process", process)
        monkeypatch.setattr(baseline, "agreement", lambda case, **_: 1e-7)
        monkeypatch.setattr(baseline.importlib.util, "find_spec", lambda name: name)
        return tried

    return use


def test_the_fastest_of_all_tries_counts_and_a_batch_without_room_is_survived(
    fake, capsys: pytest.CaptureFixture[str]
) -> None:
    def rate(form: Form) -> dict:
        if form.rows > 8 or (form.rows > 4 and form.loss == "whole"):
            return {"error": "out of memory"}
        slow = form.attention == "flash" or form.mode != "default"
        return {"rate": form.rows + (0.5 if form.loss == "chunked" else 1.0) - slow}

    tried = fake(rate)
    baseline.main("llama_1b_train", toy=False)
    *partial, final = results(capsys.readouterr().out)
    assert final["complete"] and not any(each["complete"] for each in partial)
    best = Form("default", 8, "chunked", "auto")
    # Ours again and the fastest again come last.
    assert Form(**final["best"]) == best == tried[-1] and final["theirs"] == [8.5, 8.5] and final["ours"] == [90, 90]
    assert final["ratio"] == pytest.approx(90 / 8.5) and final["ratio_range"] == [final["ratio"]] * 2
    assert {"4 rows", "8 rows", "16 rows"} <= {label.split(",")[0] for label in map(Form.label, tried)}
    failed = [Form(**turn["form"]) for turn in final["turns"] if turn.get("error") == "out of memory"]
    assert Form("default", 8, "whole") in failed and len(set(tried)) == len(tried) - 1


def test_rows_go_down_until_a_batch_fits_and_nothing_that_fits_is_an_error(
    fake, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(lambda form: {"error": "out of memory"} if form.rows > 16 else {"rate": float(form.rows)})
    baseline.main("t5_large_train", toy=False)
    final = results(capsys.readouterr().out)[-1]
    assert final["best"]["rows"] == 16 and final["ratio"] == 90 / 16
    fake(lambda form: {"error": "took more than 180 s"})
    with pytest.raises(SystemExit, match="no form of theirs was measured"):
        baseline.main("t5_large_train", toy=False)
    assert results(capsys.readouterr().out)[-1]["ours"] == [90]  # ours is not lost


def test_decoding_publishes_the_loop_and_generate_each_twice(fake, capsys: pytest.CaptureFixture[str]) -> None:
    tried = fake(lambda form: {"rate": {"loop": 60.0, "generate": 30.0, "loop_tuned": 72.0}[form.mode]})
    baseline.main("llama_8b_decode", toy=False)
    final = results(capsys.readouterr().out)[-1]
    assert [form.mode for form in tried] == ["loop", "generate", "loop_tuned", "loop_tuned", "generate"]
    assert final["ratio"] == 90 / 72 and final["ratios"] == {"loop": 1.5, "generate": 3.0, "loop_tuned": 1.25}


def test_little_time_leaves_forms_out_before_second_turns(
    fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setenv("BASELINE_SECONDS", "270")

    def rate(form: Form) -> dict:
        now[0] += 80
        return {"rate": float(form.rows), "wall": 80.0}

    tried = fake(rate)
    recorded = {"part": "train", "case": "llama_1b", **OURS}
    log = tmp_path / "log.txt"
    log.write_text(f"noise\n{RESULT}{json.dumps(recorded)}\n{RESULT}{json.dumps({**recorded, 'error': 'x'})}\n")
    monkeypatch.setenv("BASELINE_OURS", str(log))
    baseline.main("llama_1b_train", toy=False)
    final = results(capsys.readouterr().out)[-1]
    assert [form.rows for form in tried] == [4, 8, 8] and final["untried"].startswith("16 rows")
    assert [turn.get("recorded", False) for turn in final["turns"] if turn["side"] == "ours"] == [True, False]


def test_an_interrupted_side_leaves_what_was_measured(fake, capsys: pytest.CaptureFixture[str]) -> None:
    def rate(form: Form) -> dict:
        if form.mode == "generate":
            raise KeyboardInterrupt
        return {"rate": 60.0}

    fake(rate)
    with pytest.raises(KeyboardInterrupt):
        baseline.main("llama_1b_decode", toy=False)
    last = results(capsys.readouterr().out)[-1]
    assert last["ratio"] == 1.5 and not last["complete"] and len(last["turns"]) == 2


def test_a_process_that_hangs_or_fails_is_an_error_and_keeps_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = f"print({RESULT + json.dumps({'part': 'a', 'case': 'b', 'rate': 5.0})!r}, flush=True)\n"
    for name, then in {"hangs": "import time; time.sleep(60)", "fails": "raise SystemExit(3)", "ends": ""}.items():
        (tmp_path / f"{name}.py").write_text(printed + then, encoding="utf-8")
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '1980, 2619, 90.5, 40'\necho '1755, 2619, 690.1, 60'\necho '[N/A], 2619, 9, 40'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    hanging = baseline._process("hangs", limit=1.0)
    assert hanging["error"] == "took more than 1 s" and hanging["rate"] == 5.0 and hanging["wall"] < 10
    assert hanging["gpu"]["before"][0] == 1980 and hanging["gpu"]["at_most_power"] == [1755, 2619, 690.1, 60]
    assert baseline._process("fails")["error"] == "fails ended with 3"
    smi.unlink()
    good = baseline._process("ends")
    assert good["rate"] == 5.0 and "error" not in good and good["gpu"] == {}


def test_without_torch_there_is_a_clear_error_at_once(tmp_path: Path) -> None:
    hide = (
        "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'torch' else f(n, *a)\n"
    )
    program = hide + "from benchmarks.gpu.run import main; main(['--one', 'baseline/llama_1b_train'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    problem = "baseline/llama_1b_train compares with torch"  # and transformers, where neither is installed
    assert done.returncode == 1 and problem in done.stderr and "not installed here" in done.stderr


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch 2.13's own compiler still calls it
@pytest.mark.parametrize("case", ["t5_large_decode", "llama_1b_train"])
def test_a_dry_run(case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All that its processes do, in this one, torch's compiler included."""
    torch_side = pytest.importorskip("benchmarks.gpu.torch_side")

    @functools.cache
    def here(module: str, *arguments: str, limit: float = 0.0) -> dict:
        if module.endswith("baseline"):
            return {"difference": baseline.agree(Path(arguments[0]))}
        with redirect_stdout(io.StringIO()) as printed:
            if module.endswith("run"):
                run.main([*arguments])
            else:
                torch_side.main(arguments[0], json.loads(arguments[1]))
        return results(printed.getvalue())[-1]

    monkeypatch.setattr(baseline, "_process", lambda *arguments, limit=0.0: dict(here(*arguments)))
    baseline.main(case, toy=True)
    final = results(capsys.readouterr().out)[-1]
    assert final["ratio"] > 0 and final["logits_difference"] < 1e-4 and final["versions"]["torch"]
    theirs = [turn for turn in final["turns"] if turn["side"] == "theirs"]
    assert len(theirs) == baseline.TOY_FORMS[baseline.CASES[case].what]
    assert all(turn["graphs"] >= 1 and "error" not in turn for turn in theirs)
    assert all(turn.get("last_loss", 0) < turn.get("first_loss", 1) for turn in theirs)  # one batch, again and again
    assert all("_scaled_dot_product_flash_attention_for_cpu" in turn["attention_kernels"] for turn in theirs)
    assert all(turn.get("ran", "static cache, compiled") == "static cache, compiled" for turn in theirs)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["1b", "t5_large"])
def test_the_loop_and_the_chunked_loss_compute_what_transformers_does(name: str) -> None:
    torch = pytest.importorskip("torch")
    from benchmarks import torch_models

    torch.manual_seed(0)
    model = torch_models.model_of(shape(name, toy=True))
    tokens = torch.randint(2, 384, (2, 16))
    expected = torch_models.generator(model.eval(), tokens, static=False)(6)
    with torch.compiler.set_stance("force_eager"):
        loop = torch_models.greedy_loop(model, tokens, longest=6)
        assert torch.equal(loop(6), expected) and torch.equal(loop(3), expected[:, :3])
    inputs = torch_models.inputs_of([tokens.numpy(), tokens.numpy()[:, :8]][: 2 if name == "t5_large" else 1])
    targets = torch.randint(1, 384, (2, 8 if name == "t5_large" else 16))
    losses = []
    for chunk in (None, 5):
        step = torch_models.train_step(copy.deepcopy(model).train(), autocast=False, mode=None, chunk=chunk)
        losses.append([float(step(inputs, targets)) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][2] < losses[0][0]
