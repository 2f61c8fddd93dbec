"""The audit accepts a sound objective, and finds dropped tokens and spans of a wrong distribution."""

from __future__ import annotations

import inspect
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes

from display.corpus import Audit, audit, draw_spans, open_corpus, report, total_variation, view
from jaxllm.config import DataConfig, RunConfig, T5Config, TrainingConfig
from jaxllm.config.file import dump_config
from jaxllm.data import DataError
from jaxllm.data.packing import unpack_pairs
from jaxllm.data.pipeline import Pipeline
from jaxllm.run.feed import build_pipeline
from jaxllm.storage.folder import RunFolderError, open_run_folder

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def pipeline(corpus: Path, tmp_path: Path) -> Pipeline:
    config = DataConfig(source="files", path=str(corpus), objective="span_corruption", sequence_length=128)
    return build_pipeline(config, vocab_size=420, batch_size=8, seed=0, run_dir=tmp_path)


def test_a_sound_objective_drops_nothing_and_follows_the_law(pipeline: Pipeline) -> None:
    found = audit(pipeline, documents=40)
    assert (found.dropped, found.added) == (0, 0) and found.documents <= 40
    assert found.tokens == sum(len(tokens) for tokens in pipeline.tokens(40))
    assert found.density == pytest.approx(0.15, abs=0.005)
    assert found.padding[0] < 0.05 and found.padding[1] < 0.05
    assert sum(found.expected.values()) == pytest.approx(sum(found.spans.values()))
    assert total_variation(found) < 0.06
    assert report(found).row_count == 6 + 14


def test_dropped_tokens_and_another_law_are_seen(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    restore = pipeline.recipe.restore
    pipeline.recipe = pipeline.recipe._replace(restore=lambda inputs, targets: restore(inputs, targets)[1:])
    found = audit(pipeline, documents=20)
    assert found.dropped == found.examples > 0

    def regular(rng: np.random.Generator, rows: int, items: int, parts: int) -> np.ndarray:
        del rng
        sizes = np.full(parts, items // parts)
        sizes[: items % parts] += 1
        return np.tile(sizes, (rows, 1))

    monkeypatch.setattr("jaxllm.data.objectives.compositions", regular)
    assert total_variation(audit(pipeline, documents=20)) > 0.5


def test_colours_agree_and_spell_the_text(pipeline: Pipeline) -> None:
    for inputs, targets in unpack_pairs(next(pipeline.validation(1))):
        source = pipeline.recipe.restore(inputs, targets)
        seen = view(inputs, targets, source=source, tokenizer=pipeline.tokenizer)
        assert seen.source.plain == pipeline.tokenizer.decode(source)
        assert seen.inputs.plain == pipeline.tokenizer.decode(inputs)
        assert seen.targets.plain == pipeline.tokenizer.decode(targets)
        styles = [[str(span.style) for span in text.spans if span.style] for text in (seen.inputs, seen.targets)]
        assert styles[0] == styles[1] and len(styles[0]) > 1


def test_a_mode_is_read_and_is_no_part_of_the_source(corpus: Path, tmp_path: Path) -> None:
    lengths = {"sequence_length": 96, "target_length": 64}
    config = DataConfig(source="files", path=str(corpus), objective="ul2", **lengths)
    pipeline = build_pipeline(config, vocab_size=420, batch_size=32, seed=0, run_dir=tmp_path)
    modes = set()
    for inputs, targets in unpack_pairs(next(pipeline)):
        source = pipeline.recipe.restore(inputs, targets)
        seen = view(inputs, targets, source=source, tokenizer=pipeline.tokenizer)
        assert seen.source.plain == pipeline.tokenizer.decode(source)
        modes.add(seen.inputs.plain[:5])
    assert modes == {"[NLU]", "[S2S]", "[NLG]"}


def test_a_picture_of_span_lengths_has_what_the_audit_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[float]] = {}
    monkeypatch.setattr(Axes, "bar", lambda self, x, y, **_: drawn.update(lengths=list(x), found=y))
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, *_, **__: drawn.update(exact=y))
    monkeypatch.setattr(Axes, "legend", lambda self, **_: None)
    nothing = Audit(1, 100, 0, 0, 1, 1, 0.0, {}, {}, (0.0, 0.0))
    draw_spans(nothing._replace(spans={1: 3, 4: 1}, expected={1: 2.0, 2: 1.0, 20: 1.0}), str(tmp_path / "x.png"))
    assert drawn["lengths"] == list(range(1, 13))
    assert drawn["found"] == [0.75, 0, 0, 0.25] + [0] * 8 and drawn["exact"] == [0.5, 0.25] + [0] * 10
    draw_spans(nothing, None)
    with pytest.raises(ValueError, match="an objective with spans"):
        draw_spans(nothing, "x.png")


def test_script_shows_and_audits(corpus: Path, tmp_path: Path) -> None:
    settings = ["data.source=files", f"data.path={corpus}", f"training.run_dir={tmp_path / 'run'}"]
    command = [sys.executable, str(ROOT / "scripts" / "inspect_data.py"), str(ROOT / "configs" / "t5_tiny.yaml")]
    audited = [*command, *settings, "--audit", "--picture", str(tmp_path / "spans.png")]
    shown = subprocess.run(audited, capture_output=True, text=True, check=True).stdout
    assert (tmp_path / "spans.png").read_bytes().startswith(b"\x89PNG")
    assert "tokens dropped, added" in shown and "0, 0" in shown
    shown = subprocess.run([*command, *settings, "--examples", "2"], capture_output=True, text=True, check=True).stdout
    assert [shown.count(f"─ {title} ─") for title in ("source", "inputs", "targets")] == [2, 2, 2]
    assert "<extra_id_0>" in shown
    wrong = subprocess.run([*command, "data.path=/nowhere"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "error:" in wrong.stderr and "Traceback" not in wrong.stderr
    dashed = subprocess.run([*command, "--training.steps=3"], capture_output=True, text=True, check=False)
    assert dashed.returncode == 2 and "unknown --training.steps=3; write a setting without dashes" in dashed.stderr


def test_script_takes_a_home_folder_and_names_damaged_data(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(ROOT / "scripts" / "inspect_data.py"))["main"]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    settings = ["data.source=files", f"data.path={corpus}", "training.run_dir=~/run", "model.vocab_size=420"]
    command = ["inspect_data.py", str(ROOT / "configs" / "t5_tiny.yaml"), *settings, "data.workers=0"]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 0
    assert (tmp_path / "run" / "tokenizer.json").exists() and not (tmp_path / "~").exists()
    capsys.readouterr()
    for damaged in ("*-train.array_record-*", "features.json", "dataset_info.json"):
        (file,) = (tmp_path / "run" / "data").rglob(damaged)
        file.write_text("{")
        assert main() == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_a_run_that_starts_keeps_its_tokenizer(corpus: Path, tmp_path: Path) -> None:
    """Before its first step, a run would lose the tokenizer that it has in memory to one of another size."""
    data = DataConfig(source="files", path=str(corpus), objective="span_corruption")
    model = T5Config(vocab_size=420, d_model=16, d_ff=16, num_layers=1, num_heads=2)
    config = RunConfig(model=model, data=data, training=TrainingConfig(run_dir=str(tmp_path / "run")))
    with open_run_folder(config):
        with pytest.raises(RunFolderError, match="another process is training"), open_corpus(config):
            pass
        assert not (tmp_path / "run" / "tokenizer.json").exists()
        (tmp_path / "run" / "config.yaml").write_text(dump_config(config))
        (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
        with pytest.raises(DataError, match="tokenizer is not there any more"), open_corpus(config):
            pass  # its first step is made, so nothing replaces the tokenizer


@pytest.mark.parametrize("name", ["inspect_data.py", "convert_hf.py", "precision_ledger.py"])
def test_an_interrupted_script_ends_without_a_trace(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main = runpy.run_path(str(ROOT / "scripts" / name))["main"]

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    for called in ("load_config", "_convert"):
        monkeypatch.setitem(inspect.unwrap(main).__globals__, called, interrupt)
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path), str(tmp_path)])
    assert main() == 130
