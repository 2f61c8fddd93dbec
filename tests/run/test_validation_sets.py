"""Validation sets by name: their figures, what is trained on, which run may continue with which sets."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jaxllm.config import DataConfig, RunConfig
from jaxllm.config.file import ConfigError, load_config
from jaxllm.data import DataError
from jaxllm.data.packing import Batch
from jaxllm.data.pipeline import Pipeline
from jaxllm.data.tokenizer import train_tokenizer
from jaxllm.run.evaluation import evaluate
from jaxllm.run.feed import open_run_pipeline
from jaxllm.run.parts import Summary
from jaxllm.run.record import log_validation, plot_curve
from jaxllm.run.steps import make_steps
from jaxllm.run.trainer import pretrain
from jaxllm.storage.folder import RunFolderError
from jaxllm.training.program import program_of
from tests.conftest import write_corpus
from tests.run import test_pretrain, test_pretrain_t5


def write_sets(folder: Path) -> dict[str, str]:
    """Two sets: a folder of numbers, and a file of text like the corpus."""
    (folder / "digits").mkdir()
    for i in range(6):
        (folder / "digits" / f"{i}.txt").write_text(" ".join(str(i * j) for j in range(200)))
    lines = [f"line {j}: the cat {j} sat on mat {j % 7} and saw {j * j} birds\n" for j in range(60)]
    (folder / "cats.txt").write_text("".join(lines))
    return {"digits": str(folder / "digits"), "cats": str(folder / "cats.txt")}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_corpus(folder / "corpus")
    write_sets(folder)
    return folder


def config(shared: Path, name: str, sets: dict[str, str], **training: object) -> RunConfig:
    return test_pretrain.config(shared / name, shared / "corpus", data={"validation": sets}, training=training)


def sets_of(shared: Path) -> dict[str, str]:
    return {"digits": str(shared / "digits"), "cats": str(shared / "cats.txt")}


@pytest.fixture(scope="module")
def whole(shared: Path) -> tuple[RunConfig, Summary]:
    run = config(shared, "whole", sets_of(shared))
    return run, pretrain(run)


def test_each_set_has_its_figures_and_the_first_is_that_of_the_plain_columns(
    whole: tuple[RunConfig, Summary], shared: Path
) -> None:
    run, summary = whole
    kinds = ("loss", "bits_per_byte", "accuracy")
    names = [*kinds, *(f"{name}/{kind}" for name in ("digits", "cats") for kind in kinds)]
    assert list(summary.validation) == [*names, "step"]
    rows = [row for row in summary.metrics if "validation/loss" in row]
    assert [list(row) for row in rows] == [["step", *(f"validation/{name}" for name in names)]] * 2
    for row in rows:
        assert [row[f"validation/{kind}"] for kind in kinds] == [row[f"validation/digits/{kind}"] for kind in kinds]
    assert summary.validation["cats/loss"] < summary.validation["digits/loss"] - 0.01
    swapped = config(shared, "swapped", dict(reversed(sets_of(shared).items())))
    other = pretrain(swapped).validation
    assert other["loss"] == summary.validation["cats/loss"] and other["digits/loss"] == summary.validation["loss"]
    stored = load_config(shared / "whole" / "config.yaml")
    assert stored == run and list(stored.data.validation) == ["digits", "cats"]


def test_the_best_checkpoint_is_that_of_the_first_set(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = []
    real = test_pretrain.Checkpoints.evaluated
    monkeypatch.setattr(test_pretrain.Checkpoints, "evaluated", lambda *a: (noted.append(a[-1]), real(*a))[1])
    summary = pretrain(config(shared, "best", sets_of(shared)))
    rows = [row["validation/digits/loss"] for row in summary.metrics if "validation/loss" in row]
    assert noted == rows and len(rows) == 2


def documents(pipeline) -> set[str]:
    return {bytes(pipeline._source.train[i]["text"]).decode() for i in range(len(pipeline._source.train))}


def test_nothing_of_the_training_source_is_held_out_and_batches_are_those_of_the_set(shared: Path) -> None:
    run = config(shared, "data", sets_of(shared))
    pipeline = open_run_pipeline(run, shared / "data")
    texts = {path.read_text() for path in (shared / "corpus").iterdir()}
    assert documents(pipeline) == texts
    held = open_run_pipeline(config(shared, "held", {}), shared / "held")
    assert documents(held) < texts
    names = ["digits", "cats", "digits", None]
    digits, cats, again, plain = (list(pipeline.validation(100, name)) for name in names)
    assert len(digits) != len(cats)
    for other in (again, plain):
        for a, b in itertools.zip_longest(digits, other):
            np.testing.assert_array_equal(a["tokens"], b["tokens"])
    seen = pipeline.tokenizer.decode(np.concatenate([batch["tokens"].ravel() for batch in cats]))
    assert "the cat 59 sat on mat 3 and saw 3481 birds" in seen and "digits" not in seen
    for each in (pipeline, held):
        each.close()


def test_a_resume_keeps_the_first_set_and_may_change_the_others(
    whole: tuple[RunConfig, Summary], shared: Path, tmp_path: Path
) -> None:
    run, summary = whole
    first, second = sets_of(shared).items()
    parts = [config(shared, "parts", dict(sets)) for sets in ([first], [first, second])]
    assert "cats/loss" not in pretrain(parts[0], stop_at=4).validation
    added = pretrain(parts[1])
    assert added.resumed_from == 4 and added.validation == summary.validation
    for a, b in zip(test_pretrain.final_params(run), test_pretrain.final_params(parts[1]), strict=True):
        np.testing.assert_array_equal(a, b)
    for sets in ([second, first], [second], [("digits", second[1])], []):
        with pytest.raises(RunFolderError, match=r"data\.validation: \('digits', .*the first set must stay"):
            pretrain(config(shared, "parts", dict(sets)))
    held = test_pretrain.config(tmp_path / "held", shared / "corpus", training={"steps": 1})
    pretrain(held)
    with pytest.raises(RunFolderError, match=r"data\.validation: held-out documents -> \('digits'"):
        pretrain(test_pretrain.config(tmp_path / "held", shared / "corpus", data={"validation": sets_of(shared)}))


def test_changed_files_of_the_first_set_are_refused(shared: Path, tmp_path: Path) -> None:
    sets = write_sets(tmp_path)
    run = config(shared, "changed", sets)
    pretrain(run, stop_at=1)
    (tmp_path / "cats.txt").write_text("another text of cats")  # of the second, which may change
    pretrain(run, stop_at=2)
    (tmp_path / "digits" / "new.txt").write_text("1 2 3")
    with pytest.raises(DataError, match="the checkpoint was made with validation 'files"):
        pretrain(run)


def test_bad_paths_and_names_are_named_before_anything_is_compiled(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxllm.run.trainer.make_steps", lambda *_: pytest.fail("compiles"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "nothing.txt").write_text("")
    cases = {
        tmp_path / "absent": r"data\.validation\.books .*absent does not exist",
        tmp_path / "empty": r"data\.validation\.books .*empty holds no file ending in",
        tmp_path / "nothing.txt": r"data\.validation\.books .*nothing.txt: all 1 files are empty",
        tmp_path / "blank.txt": r"data\.validation\.books .*blank.txt has no documents",
        shared / "corpus" / "00.txt": r"data\.validation\.books .*00.txt and data\.path .* documents in common",
        shared: r"is in data\.validation\.books",
    }
    for path, message in cases.items():
        with pytest.raises(DataError, match=message):
            pretrain(config(shared, "bad", {"cats": str(shared / "cats.txt"), "books": str(path)}))
    for sets in ({"a/b": "x"}, {"": "x"}, {"a": ""}):
        with pytest.raises(ConfigError, match=r"validation needs a path for each name, and names of letters"):
            config(shared, "bad", sets)
    assert DataConfig(validation={"a": Path("x")}).validation == {"a": "x"}


def test_log_and_picture_show_each_set(
    whole: tuple[RunConfig, Summary], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes
    from matplotlib.text import Text

    run, summary = whole
    with caplog.at_level(logging.INFO, "jaxllm"):
        log_validation(8, {"own": 1.0, **summary.validation, "x/y": 2.0}, run.data.validation)
    lines = [record.message for record in caplog.records]
    assert [line.split(" loss")[0] for line in lines[:2]] == ["step 8 validation digits:", "step 8 validation cats:"]
    assert lines[2].startswith("step 8 validation own 1.0000 step") and "loss" not in lines[2]
    assert all(len(line) < 80 for line in lines)
    drawn = []
    monkeypatch.setattr(Axes, "annotate", lambda self, text, *_, **__: drawn.append(text) or Text())
    plot_curve(summary.folder, {}, "bits_per_byte")
    assert [text.rpartition(" ")[0] for text in sorted(drawn)] == ["training", "validation cats", "validation digits"]
    assert (summary.folder / "loss.png").exists()


def test_t5_counts_target_bytes_and_spans_of_each_set(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    data = {"path": str(tmp_path / "corpus"), "objective": "span_corruption", "validation": write_sets(tmp_path)}
    summary = pretrain(test_pretrain_t5.config(tmp_path, "run", data))
    for name in ("digits", "cats"):
        found = {key.split("/")[1] for key in summary.validation if key.startswith(f"{name}/")}
        assert found == {"loss", "bits_per_target_byte", "accuracy", "spans_exact"}


def test_no_token_has_no_loss(shared: Path) -> None:
    """A loss of 0 would make its checkpoint the best of all."""

    class Empty(Pipeline):
        def __init__(self) -> None:
            self.sets, self.tokenizer = {}, train_tokenizer(["a"], vocab_size=400)

        def validation(self, count: int, name: str | None = None) -> Iterator[Batch]:
            return iter(())

    values = evaluate(make_steps(program_of(config(shared, "none", {})), None), {}, Empty())
    assert len(values) == 3 and np.isnan([*values.values()]).all()
