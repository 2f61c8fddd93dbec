"""The GPU benchmark: its programs at toy sizes, and a runner that keeps its measurements whatever happens."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from benchmarks.gpu import cache, decode, plan, pretrain, record, run, table, train
from benchmarks.gpu.plan import Planned
from benchmarks.gpu.variants import VARIANTS, split
from benchmarks.report import RESULT, results_in
from jaxllm.config.file import load_config

ROOT = Path(__file__).parent.parent.parent
MACHINE = record.Machine("Some GPU", "", {"jax": "0.11.2"}, "abc1234")


def result(capsys: pytest.CaptureFixture[str]) -> dict:
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(RESULT)]
    return json.loads(lines[-1].removeprefix(RESULT))


def test_decode_cases(capsys: pytest.CaptureFixture[str]) -> None:
    for case in ("1b_b8", "t5_large_b8"):
        decode.main(case, toy=True)
        measured = result(capsys)
        assert measured["tokens_per_second"] > 0 and measured["read_gb_per_step"] > 0
        assert measured["cudnn_calls"] == 0


def test_a_train_case(capsys: pytest.CaptureFixture[str]) -> None:
    train.main("t5_large_fp16@nolengths", toy=True)
    measured = result(capsys)
    assert measured["last_loss"] < measured["first_loss"]  # one batch, again and again
    assert measured["estimated_gb"] >= measured["temporary_gb"]


def test_an_attention_that_is_refused_is_in_the_log_and_counted() -> None:
    """The result has the attention of the config; its calls of cuDNN are none, and the log has the reason."""
    code = """
from unittest import mock
from benchmarks.gpu import run
from benchmarks.gpu.cards import pretend_gpu
refusal = RuntimeError("cuDNN is not detected.")
with pretend_gpu(), mock.patch("jax.nn.dot_product_attention", side_effect=refusal):
    run._run_here("train/llama_1b", toy=True, profile=False)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    (measured,) = results_in(done.stdout)
    assert measured["attention"] == "auto" and measured["cudnn_calls"] == 0
    assert "attention: chunked (cuDNN is not detected.)" in done.stderr.splitlines()
    assert "cudnn_calls 0" in run.summary(measured)


def test_a_variant_changes_flags_settings_or_the_case() -> None:
    with pytest.raises(ValueError, match=r"no variant cubals; there are .*cublas"):
        split("train/llama_1b@cubals")
    assert split("train/llama_1b") == ("train/llama_1b", [])
    _, both = split("train/llama_1b@cublas+merger0")
    assert both == [VARIANTS["cublas"], VARIANTS["merger0"]]
    for name, residual in (("t5_large_fp16", "bfloat16"), ("t5_large_fp16@f32_residual", "float32")):
        config = train.run_config(train.case_of(name), toy=True)
        assert config.precision.islands == {"residual": residual}
    without = train.case_of("t5_large@nolengths")
    assert "encoder_lengths" not in train.synthetic_batch(
        train.run_config(without, toy=True), documents=1, lengths=without.lengths
    )


def test_the_script_is_killed_and_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command as on a GPU, in float16 with a loss scale; packages for pictures and Parquet may be missing."""
    for name in ("pyarrow", "matplotlib"):
        missing = f"raise ModuleNotFoundError('No module named {name}')\n"
        (tmp_path / f"{name}.py").write_text(missing, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    pretrain.main("llama_fp16", toy=True)
    measured = result(capsys)
    assert 0 < measured["resumed_from"] <= measured["killed_at"] < measured["step"] == 40
    assert measured["loss_scale"] >= 1 and measured["bits_per_byte"] > 0 and measured["sample"]


def test_what_the_script_is_given_are_settings_that_it_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for carried in (False, True):
        monkeypatch.setattr(pretrain, "CARRIED", tmp_path / str(carried))
        (tmp_path / str(carried)).mkdir()
        if carried:
            (tmp_path / "True" / "tokenizer.json").touch()
        for name, case in pretrain.CASES.items():
            file, *overrides = pretrain.script_arguments(case, tmp_path, toy=False)
            config = load_config(file, overrides)
            assert (config.precision.compute == "float16") == ("fp16" in name)
            assert config.data.source == ("files" if carried else "stdlib")
            # Killed after its first checkpoint, it has most of its steps left; the warm-up leaves time to learn.
            training, optimizer = config.training, config.optimizer
            assert training.save_every <= training.steps // 4 and optimizer.warmup_steps <= training.steps // 5
            assert training.eval_every == training.steps


def test_the_script_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain.importlib.util, "find_spec", lambda name: None if name == "grain" else object())
    with pytest.raises(SystemExit, match=r"grain not installed; fill carried/ by benchmarks/gpu/carry\.sh"):
        pretrain.main("llama_fp16", toy=True)


def test_every_program_is_planned_and_the_first_call_has_its_limit(capsys: pytest.CaptureFixture[str]) -> None:
    names = [case.name for case in plan.EVERY]
    assert len(set(names)) == len(names)
    for module in (train, decode, pretrain):
        part = module.__name__.split(".")[-1]
        assert {f"{part}/{case}" for case in module.CASES} <= set(names)
    assert all(case.seconds <= case.limit for case in plan.EVERY)
    assert sum(case.seconds for case in plan.FIRST) <= plan.FIRST_SECONDS < 400
    for case in plan.EVERY:
        part, name = case.name.split("/")
        if part != "tests":  # each is called with its name and toy, and profiled where the plan has it
            entry = importlib.import_module(f"benchmarks.gpu.{part}").main
            inspect.signature(entry).bind(name, toy=True, **({"profile": True} if case.profile else {}))
    assert plan.FIRST[0].name == "pretrain/llama_fp16"  # what the user asked for
    assert run.main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in names) and re.search(r"train/llama_1b +75 s, at most 140 s", shown)


def test_a_list_that_is_read_in_part_ends_without_a_trace() -> None:
    command = f"bash {ROOT / 'benchmarks' / 'run_gpu.sh'} --list | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("first: ") and len(done.stdout.splitlines()) == 1 and not done.stderr


def test_an_exact_name_is_that_case_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert [case.name for case in plan.cases_of("train/llama_1b")] == ["train/llama_1b"]
    assert [case.name for case in plan.cases_of("decode/1b_b1@cublas+graphs")] == ["decode/1b_b1@cublas+graphs"]
    assert {"decode/1b_b8", "decode/1b_b64"} < {case.name for case in plan.cases_of("decode/1b_b")}
    for wrong, message in (
        (["decod/1b"], "error: no case is, or begins with, decod/1b; --list names them all"),
        (["train/llama_1b@nothing"], "error: no variant nothing; there are"),
        (["next"], "error: next takes the seconds it may use, e.g. next 330"),
    ):
        with pytest.raises(SystemExit) as ended:
            run.main(wrong)
        assert ended.value.code == 2 and message in capsys.readouterr().err


def test_without_a_gpu_the_lane_stops_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([(0, "cpu|cpu"), (1, "cuInit failed")])
    monkeypatch.setattr(record, "first_line", lambda *_: next(answers))
    monkeypatch.setattr(record, "nvidia_devices", list)
    assert run.main(["first"]) == run.NO_GPU
    assert capsys.readouterr().err.startswith("error: no NVIDIA GPU here")
    monkeypatch.setattr(record, "nvidia_devices", lambda: [Path("/dev/nvidia3")])
    for reason in ("jax uses no GPU here: cpu|cpu", "jax uses no GPU here: cuInit failed"):
        assert run.main(["first"]) == run.NO_GPU
        assert reason in capsys.readouterr().err


def test_a_gpu_is_found_with_the_flags_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "first_line", lambda _: (0, "gpu|NVIDIA H100 80GB HBM3"))
    monkeypatch.setattr(record, "nvidia_devices", lambda: [Path("/dev/nvidia0")])
    monkeypatch.setenv("BENCH_COMMIT", "abc1234")
    monkeypatch.setenv("XLA_FLAGS", "--mine=1")
    assert record.find_gpu()[:2] == ("NVIDIA H100 80GB HBM3", "--mine=1")


def test_a_machine_without_git_names_the_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("BENCH_COMMIT", raising=False)
    assert re.fullmatch("[0-9a-f]{7,}", record.commit())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert re.fullmatch("sources [0-9a-f]{10}", record.commit())
    monkeypatch.setenv("BENCH_COMMIT", "abc1234")
    assert record.commit() == "abc1234"


def lane(folder: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Every case of the lane is this program, which finds its name in sys.argv."""
    file = folder / "case.py"
    file.write_text(f"import sys, time, json, os\nname = sys.argv[-1]\n{program}", encoding="utf-8")
    monkeypatch.setattr(run, "_command", lambda case, toy: [sys.executable, str(file), case.name])


def cases(*names: str, limit: int = 60) -> list[Planned]:
    return [Planned(name, 1, limit) for name in names]


PRINT = (
    "print('RESULT ' + json.dumps({'part': name.split('/')[0], 'case': name.split('/')[1], 'mfu': 0.5}), flush=True)"
)


def test_what_was_measured_before_a_failure_is_in_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A case that fails, one that hangs after its first result, and one that is killed."""
    program = f"""
if 'silent' in name: sys.exit(6)
{PRINT}
sys.stderr.write('the reason\\n')
if 'fails' in name: sys.exit(5)
if 'hangs' in name: time.sleep(60)
if 'killed' in name: os.kill(os.getpid(), 9)
"""
    lane(tmp_path, monkeypatch, program)
    out = tmp_path / "out"
    wanted = [*cases("train/good", "train/fails", "train/killed", "train/silent"), *cases("train/hangs", limit=2)]
    assert run.run_all(wanted, machine=MACHINE, seconds=100, out=out) == 1
    document = json.loads((out / "gpu_Some_GPU.json").read_text())
    rows = {each["case"]: each for each in document["results"]}
    assert rows["good"]["mfu"] == 0.5 and rows["good"]["commit"] == "abc1234" and "error" not in rows["good"]
    for name, reason in (("fails", "ended with 5"), ("killed", "ended with -9"), ("hangs", "took more than 2 s")):
        assert rows[name]["mfu"] == 0.5 and reason in rows[name]["ended"] and "the reason" in rows[name]["ended"]
    assert rows["silent"]["error"].endswith("ended with 6") and "mfu" not in rows["silent"]
    log = (out / "log.txt").read_text()
    assert log.count("the reason") == 4 and all(f"=== train/{name}" in log for name in rows)
    assert "failed: train/fails, train/killed, train/silent, train/hangs" in capsys.readouterr().out


@pytest.mark.parametrize("when", ["running", "starting"])
def test_a_lane_that_is_ended_keeps_results_and_ends_its_case(tmp_path: Path, when: str) -> None:
    """SIGTERM while a case runs, or is started: its processes end, and the results before it are in the folder."""
    mark, out, driver = tmp_path / "mark", tmp_path / "out", tmp_path / "driver.py"
    (tmp_path / "good.py").write_text(f"import json\nname = 'train/good'\n{PRINT}", encoding="utf-8")
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(mark)!r}).touch()"
    (tmp_path / "slow.py").write_text(
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])", encoding="utf-8"
    )
    driver.write_text(
        f"""
import signal, subprocess, sys
from pathlib import Path
from benchmarks.gpu import record, run
from benchmarks.gpu.plan import Planned

class Interrupted(subprocess.Popen):
    def __init__(self, command, **options):
        super().__init__(command, **options)
        if "slow" in command[1]:
            signal.raise_signal(signal.SIGTERM)

if {when == "starting"}:
    subprocess.Popen = Interrupted
run._command = lambda case, toy: [sys.executable, "{tmp_path}/" + case.name.split("/")[1] + ".py"]
cases = [Planned("train/good", 1, 60), Planned("train/slow", 1, 60)]
run.run_all(cases, machine=record.Machine("Some GPU", "", {{}}, "abc1234"), seconds=100, out=Path("{out}"))
""",
        encoding="utf-8",
    )
    process = subprocess.Popen(
        [sys.executable, str(driver)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    if when == "running":
        deadline = time.monotonic() + 60
        while not (out / "log.txt").exists() or "=== train/slow" not in (out / "log.txt").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    rows = json.loads((out / "gpu_Some_GPU.json").read_text())["results"]
    assert [row["case"] for row in rows] == ["good"]
    time.sleep(4.5)
    assert not mark.exists()


def test_next_runs_what_is_unmeasured_and_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lane(tmp_path, monkeypatch, PRINT)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    planned = [Planned("train/a", 1, 60), Planned("train/b", 900, 999), Planned("train/c", 1, 60)]
    first = run.run_all(planned[:1], machine=MACHINE, seconds=100, out=tmp_path / "results")
    assert first == 0
    capsys.readouterr()
    assert run.run_all(planned, machine=MACHINE, seconds=100, out=tmp_path / "out", unmeasured=True) == 0
    shown = capsys.readouterr().out
    assert not re.search("^train/a", shown, flags=re.M) and re.search("^train/c .* mfu 0.5", shown, flags=re.M)
    assert re.search(r"train/b +left out: \d+ s remain, it takes 900", shown)
    rows = json.loads((tmp_path / "out" / "gpu_Some_GPU.json").read_text())["results"]
    assert [row["case"] for row in rows] == ["a", "c"]  # the earlier ones come along


def test_a_failure_does_not_replace_a_measurement(tmp_path: Path) -> None:
    kept = record.Record(MACHINE, tmp_path)
    kept.add({"part": "train", "case": "a", "mfu": 0.5})
    kept.add({"part": "train", "case": "a", "error": "out of memory"})
    kept.add({"part": "train", "case": "b", "error": "out of memory"})
    assert kept.measured("train/a") and not kept.measured("train/b") and not kept.measured("train/c")
    assert not list(tmp_path.glob("*.new"))


def test_a_broken_line_costs_its_own_result_alone() -> None:
    """The threads of XLA write to the same file, and a kill cuts a line off."""
    good = {"part": "train", "case": "a", "mfu": 0.5}
    text = (
        f"W0000 x{RESULT}{json.dumps(good)}W0000 slow compile\n{RESULT}{{bad\n{RESULT}5\n{RESULT}"
        + json.dumps(good)[:-4]
    )
    assert results_in(text) == [good]


def test_the_cases_need_no_data_library() -> None:
    """Without carried wheels all cases still run, except the script's."""
    blocked = "tensorflow_datasets", "grain", "array_record", "pyarrow", "zstandard"
    code = f"""
import sys
sys.modules.update(dict.fromkeys({blocked}))
from benchmarks.gpu import decode, probe, run, train
train.run_config(train.case_of("t5_large_fp16"), toy=False)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_gpu_tests_that_were_all_skipped_are_a_failure() -> None:
    case = Planned("tests/gpu", 1, 60)
    assert run._error_of(case, 0, "sss\n16 skipped in 15.1s\n", 60) == "sss\n16 skipped in 15.1s\nno test ran"
    assert run._error_of(case, 0, "16 passed, 2 warnings in 40.1s\n", 60) is None
    assert "ended with 1" in str(run._error_of(case, 1, "1 failed, 15 passed\n", 60))


def test_the_compilation_cache_travels_in_a_few_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, out, again = tmp_path / "jax", tmp_path / "out", tmp_path / "again"
    (made / "autotune").mkdir(parents=True)
    out.mkdir()
    (made / "autotune" / "one").write_bytes(b"small")
    for name in ("program_a", "program_b"):
        (made / name).write_bytes(os.urandom(17 * 2**20))
    cache.pack(made, out)
    parts = sorted(out.iterdir())
    assert len(parts) == 2 and all(part.stat().st_size < 16 * 2**20 for part in parts)
    cache.unpack(out, again)
    assert (again / "autotune" / "one").read_bytes() == b"small"
    assert (again / "program_a").read_bytes() == (made / "program_a").read_bytes()
    assert not (again / "program_b").exists()  # no room
    parts[1].unlink()
    cache.unpack(out, tmp_path / "third")
    assert "the carried compilation cache is not used" in capsys.readouterr().out
    cache.unpack(tmp_path / "nothing", tmp_path / "fourth")


def test_what_a_machine_without_a_network_lacks_is_carried() -> None:
    """The packages of a run are either there with jax, flax, orbax and transformers, or in carry.sh's list."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    there = {"jax", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers", "safetensors", "pyyaml", "rich"}
    there |= {"jaxtyping", "pyarrow", "matplotlib"}
    carried = (ROOT / "benchmarks" / "gpu" / "carry.sh").read_text(encoding="utf-8")
    names = [re.split(r"[>=<\[; ]", entry)[0].lower() for entry in project["dependencies"]]
    words = set(re.split(r"\s+|==[\d.]+", carried.replace("_", "-")))
    assert not [name for name in names if name not in there and name.replace("_", "-") not in words]
    assert {"cuda12", "cuda13"} <= set(project["optional-dependencies"])


def test_results_and_cache_of_an_earlier_call_are_carried_and_wheels_stay(tmp_path: Path) -> None:
    """No network: the wheels are there. The files of a call are read-only."""
    root, files = tmp_path / "root", tmp_path / "files"
    for folder in (root / "benchmarks" / "gpu", root / "benchmarks" / "results", root / "carried", files):
        folder.mkdir(parents=True)
    script = root / "benchmarks" / "gpu" / "carry.sh"
    script.write_text((ROOT / "benchmarks" / "gpu" / "carry.sh").read_text(encoding="utf-8"), encoding="utf-8")
    for name in ("grain-1.whl", "cache.tar.0of2", "cache.tar.1of2"):
        (root / "carried" / name).touch()
    for name in ("gpu_Some_GPU.json", "cache.tar.0of1", "log.txt"):
        (files / name).touch(mode=0o444)
    for _ in range(2):
        subprocess.run(["bash", str(script), str(files)], check=True, capture_output=True)
    assert sorted(path.name for path in (root / "carried").iterdir()) == ["cache.tar.0of1", "grain-1.whl"]
    assert [path.name for path in (root / "benchmarks" / "results").iterdir()] == ["gpu_Some_GPU.json"]


def test_tables_are_made_of_what_there_is(tmp_path: Path) -> None:
    begin, end = table.MARKERS
    for file in ("README.md", "docs/gpu.md"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(f"before\n{begin}\nold\n{end}\nafter", encoding="utf-8")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    table.main([], root=tmp_path)
    assert "No GPU figure exists yet" in (tmp_path / "README.md").read_text()
    kernels = [{"name": "fusion", "where": "mlp", "milliseconds": 1.25, "calls": 16.0, "fraction": 0.1}]
    kept = record.Record(MACHINE, tmp_path / "benchmarks" / "results")
    kept.add({"part": "train", "case": "llama_1b", "tokens_per_second": 5.0, "mfu": 0.5, "kernels": kernels})
    kept.add({"part": "train", "case": "llama_1b_packed", "tokens_per_second": 4.0})
    kept.add({"part": "decode", "case": "1b_b1", "error": "Traceback\nout of memory"})
    table.main([], root=tmp_path)
    readme, guide = (tmp_path / "README.md").read_text(), (tmp_path / "docs" / "gpu.md").read_text()
    assert readme.startswith("before") and readme.endswith("after") and "old" not in readme
    assert "| train llama_1b | 5 tokens/s | 50.0% MFU |" in readme and "packed" not in readme
    assert "Some GPU (jax 0.11.2), commit abc1234 on 20" in readme
    assert "packed" in guide and "1b_b1: out of memory" in guide and "| 1.250 | 16 | `fusion` mlp |" in guide
    with pytest.raises(ValueError, match="put these two lines into it"):
        table.insert("nothing", "text")
