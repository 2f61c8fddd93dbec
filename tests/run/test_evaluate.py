"""scripts/evaluate.py: the figures of a run on disk are those that the run logged, and its folder stays as it is."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from display.convert import export_run
from display.evaluation import evaluate_path
from jaxllm.config import RunConfig
from jaxllm.config.file import ConfigError
from jaxllm.data import DataError
from jaxllm.interop import InteropError
from jaxllm.run.load import load_run, load_text_model
from jaxllm.run.record import read_metrics
from jaxllm.run.trainer import pretrain
from jaxllm.storage.checkpoint import CheckpointError
from tests.conftest import write_corpus
from tests.run import test_pretrain, test_pretrain_t5
from tests.run.test_validation_sets import write_sets

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "evaluate.py"


def logged(run: RunConfig, step: int) -> dict[str, float]:
    rows = read_metrics(Path(run.training.run_dir) / "metrics.jsonl")
    (row,) = [row for row in rows if row["step"] == step and "validation/loss" in row]
    return {name.removeprefix("validation/"): value for name, value in row.items() if name != "step"}


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Time and content of every file."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(p): (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest()) for p in [*files]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    write_corpus(folder / "corpus")
    write_sets(folder)
    return folder


def sets_of(folder: Path) -> dict[str, str]:
    return {"digits": str(folder / "digits"), "cats": str(folder / "cats.txt")}


@pytest.fixture(scope="module")
def held_out(folder: Path) -> RunConfig:
    """A run with held-out documents, which lie prepared in its folder."""
    run = test_pretrain.config(folder / "held", folder / "corpus")
    pretrain(run)
    return run


@pytest.fixture(scope="module")
def named(folder: Path) -> RunConfig:
    data = {"validation": sets_of(folder)}
    run = test_pretrain.config(folder / "named", folder / "corpus", data=data, training={"keep": 2})
    pretrain(run)
    return run


def test_a_run_has_the_figures_that_it_logged_and_stays_as_it_is(held_out: RunConfig, named: RunConfig) -> None:
    for run in (held_out, named):
        path = Path(run.training.run_dir)
        before = snapshot(path)
        assert evaluate_path(path) == logged(run, 8)
        assert evaluate_path(f"{path}@4") == logged(run, 4) != logged(run, 8)
        assert snapshot(path) == before


def test_without_its_prepared_data_the_folder_stays_as_it_is(held_out: RunConfig, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(held_out.training.run_dir, copy, ignore=shutil.ignore_patterns("data"))
    before = snapshot(copy)
    assert evaluate_path(copy) == logged(held_out, 8)
    assert snapshot(copy) == before and not (copy / "data").exists()


def test_another_run_at_the_old_place_does_not_matter(
    held_out: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy is evaluated where its config.yaml names the folder of a run with another tokenizer and a lost parent."""
    copy = tmp_path / "copy"
    shutil.copytree(held_out.training.run_dir, copy)
    text = (copy / "config.yaml").read_text().replace("branch_from: null", "branch_from: nowhere@3")
    (copy / "config.yaml").write_text(text.replace(f"run_dir: {held_out.training.run_dir}", "run_dir: other"))
    assert "branch_from: nowhere@3" in (copy / "config.yaml").read_text()
    assert "run_dir: other\n" in (copy / "config.yaml").read_text()
    shutil.copytree(copy, tmp_path / "other")
    kept = json.loads((copy / "tokenizer.json").read_text())
    kept["model"]["merges"].pop()
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(kept))
    monkeypatch.chdir(tmp_path)
    assert evaluate_path(copy) == logged(held_out, 8)


def test_other_sets_and_settings(held_out: RunConfig, named: RunConfig, folder: Path) -> None:
    cats = sets_of(folder)["cats"]
    found = evaluate_path(named.training.run_dir, [f"data.validation={{mine: {cats}}}"])
    expected = logged(named, 8)
    assert found["loss"] == found["mine/loss"] == expected["cats/loss"] and "digits/loss" not in found
    corpus = f"data.validation.corpus={folder / 'corpus'}"  # also of documents that were trained on
    every = evaluate_path(held_out.training.run_dir, [corpus, "training.eval_batches=1000"])
    assert every["corpus/loss"] != evaluate_path(held_out.training.run_dir, [corpus])["corpus/loss"]


def test_t5_has_its_figures_too_with_spans_and_workers(folder: Path) -> None:
    data = {"path": str(folder / "corpus"), "objective": "span_corruption", "workers": 1}
    run = test_pretrain_t5.config(folder, "t5", data)
    pretrain(run)
    assert evaluate_path(run.training.run_dir) == logged(run, 4)
    assert "spans_exact" in logged(run, 4)


def test_a_hugging_face_directory_has_the_figures_of_its_run(named: RunConfig, folder: Path) -> None:
    export_run(named.training.run_dir, folder / "hf")
    settings = ["data.sequence_length=32", "training.batch_size=4", "training.eval_batches=2"]
    sets = [f"data.validation.{name}={path}" for name, path in sets_of(folder).items()]
    before = snapshot(folder / "hf")
    found = evaluate_path(folder / "hf", [*settings, *sets])
    assert found == pytest.approx(logged(named, 8), rel=1e-6)
    assert snapshot(folder / "hf") == before
    with pytest.raises(ConfigError, match=r"hf has no validation set; name one, e\.g\. data\.validation\.mine=PATH"):
        evaluate_path(folder / "hf")


def test_what_is_missing_is_named(named: RunConfig, folder: Path, tmp_path: Path) -> None:
    run = named.training.run_dir
    cases: list[tuple[Any, list[str], type[Exception], str]] = [
        (f"{run}@5", [], CheckpointError, "keeps no checkpoint of step 5; it keeps 4, 8"),
        (tmp_path, [], ConfigError, "neither a run folder"),
        (f"{tmp_path}@5", [], ConfigError, "neither a run folder"),
        (run, ["data.validation.mine=nowhere"], DataError, r"data\.validation\.mine nowhere does not exist"),
        (run, ["training.nonsense=1"], ConfigError, "unknown key training.nonsense"),
        (run, ["model.d_model=64"], ConfigError, "holds another model"),
    ]
    for path, overrides, kind, message in cases:
        with pytest.raises(kind, match=message):
            evaluate_path(path, overrides)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InteropError, match="model_type"):
        evaluate_path(tmp_path)


def test_own_parts_are_named_in_a_warning(
    held_out: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(held_out.training.run_dir, tmp_path / "own")
    (tmp_path / "own" / "parts.json").write_text('{"loss": "mine"}')
    evaluate_path(tmp_path / "own")
    assert "has parts of its own (parts.json), which an evaluation from outside does not use" in caplog.text


def test_a_step_can_be_loaded_too(held_out: RunConfig) -> None:
    path = held_out.training.run_dir
    newest, fourth = (load_run(each)[1]["final_norm"]["weight"] for each in (path, f"{path}@4"))
    assert (newest != fourth).any() and (load_run(f"{path}@8")[1]["final_norm"]["weight"] == newest).all()
    assert (load_text_model(f"{path}@4").params.final_norm == fourth).all()


def test_the_script_prints_json_and_names_errors(named: RunConfig, folder: Path) -> None:
    run, cats = named.training.run_dir, sets_of(folder)["cats"]
    ended = script(f"{run}@4", "training.eval_batches=1", "--data", cats, "--data", f"more={folder / 'digits'}")
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert {name for name in found if name.endswith("/loss")} == {"cats/loss", "more/loss"}
    same = evaluate_path(f"{run}@4", ["training.eval_batches=1", f"data.validation.cats={cats}"])
    assert found["cats/loss"] == pytest.approx(same["cats/loss"], rel=1e-5)
    assert "parameters of step 4" in ended.stderr
    ended = script(run, "--data", cats, "--data", cats)
    assert ended.returncode == 2 and "different names" in ended.stderr
    ended = script(run, "--data", "no where.jsonl.gz")
    assert ended.returncode == 2 and "error: data.validation.no_where no where.jsonl.gz does not" in ended.stderr


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_tasks_without_the_harness_name_the_extra() -> None:
    ended = script("runs/any", "--tasks", "piqa")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: tasks need lm-evaluation-harness: pip install 'jaxllm[eval]'")
    ended = script("runs/any", "--tasks", "piqa", "training.eval_batches=3", "--data", "books.txt")
    assert ended.returncode == 2 and "leave out training.eval_batches=3 --data books.txt" in ended.stderr
