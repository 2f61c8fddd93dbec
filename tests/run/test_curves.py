"""Curves of one run and of several: what is drawn, its labels, and the command `jaxllm plot`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import same_color
from matplotlib.lines import Line2D

import plot_runs
from jaxllm.run.record import plot_curve, runs_figure
from tests.study.test_pictures import check_labels, labels_of

Rows = list[dict[str, Any]]


def rows(final: float, *, sets: tuple[str, ...] = (), validation: bool = True, name: str = "bits_per_byte") -> Rows:
    """Metrics of 60 steps; sets end 0.5, 1.0 ... above the training."""
    found: Rows = []
    for step in (1, 20, 40, 60):
        value = final + 6 * (60 - step) / 60
        found.append({"step": step, name: value, "loss": value, "loss_scale": 65536.0 * step, "fingerprint": "x"})
        if validation and step % 40 == 20:
            values = {f"validation/{each}/{name}": value + 0.5 * (i + 1) for i, each in enumerate(sets)}
            found.append({"step": step, **values, f"validation/{name}": value + 0.5})
    return found


def pale(line: Line2D) -> bool:
    return (line.get_alpha() or 1) < 1


def test_one_run_has_training_pale_and_validation_strong() -> None:
    figure = runs_figure({"mine": rows(2.0)}, "bits_per_byte", {"unigram": 3.0})
    axes = figure.axes[0]
    validation, training, level = axes.lines
    assert pale(training) and not pale(validation) and same_color(training.get_color(), validation.get_color())
    assert list(training.get_xdata()) == [1, 20, 40, 60] and list(validation.get_xdata()) == [20, 60]
    assert training.get_ydata()[-1] == 2.0 and validation.get_ydata()[-1] == 2.5
    assert set(level.get_ydata()) == {3.0} and list(level.get_xdata()) == [0, 60]
    assert {text.get_text() for text in labels_of(figure)} == {"training 2", "validation 2.5", "unigram 3"}
    assert (axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel()) == ("mine", "step", "bits per byte")
    check_labels(figure)


def test_the_steep_beginning_of_training_leaves_the_figure_at_the_top() -> None:
    axes = runs_figure({"mine": [*rows(2.0), {"step": 2, "bits_per_byte": 99.0}]}, "bits_per_byte").axes[0]
    assert axes.get_ylim()[1] == pytest.approx(1.5 * max(axes.lines[0].get_ydata()))
    assert runs_figure({"mine": rows(9.0)}, "bits_per_byte").axes[0].get_ylim()[1] > 15  # nothing to leave


@pytest.mark.parametrize("count", [1, 2, 5])
def test_runs_have_their_own_colours_and_names_at_the_ends(count: int) -> None:
    runs = {f"run_{i}": rows(2.0 + 0.01 * i) for i in range(count)}
    figure = runs_figure(runs, "bits_per_byte")
    strong = [line for line in figure.axes[0].lines if not pale(line)]
    assert len({line.get_color() for line in strong}) == count == len(strong)
    assert {line.get_color() for line in figure.axes[0].lines} == {line.get_color() for line in strong}
    texts = {text.get_text().split()[0] for text in labels_of(figure)}
    assert texts == (set(runs) if count > 1 else {"validation", "training"})
    check_labels(figure)


def test_runs_without_validation_show_their_training_strong() -> None:
    figure = runs_figure({"a": rows(2.0, validation=False), "b": rows(2.2)}, "bits_per_byte")
    assert [pale(line) for line in figure.axes[0].lines] == [False, False, True]
    assert {text.get_text() for text in labels_of(figure)} == {"a 2", "b 2.7"}


@pytest.mark.parametrize("other", [False, True], ids=["alone", "with another run"])
def test_validation_sets_replace_the_plain_columns(other: bool) -> None:
    runs = {"mine": rows(2.0, sets=("code", "books")), **({"other": rows(2.0)} if other else {})}
    figure = runs_figure(runs, "bits_per_byte")
    texts = {text.get_text() for text in labels_of(figure)}
    if other:
        assert texts == {"mine code 2.5", "mine books 3", "other 2.5"}
    else:
        assert texts == {"validation code 2.5", "validation books 3", "training 2"}
    check_labels(figure)


def test_null_is_a_gap_and_a_large_value_is_written_out() -> None:
    found = rows(2.0)
    found[2]["bits_per_byte"] = None
    training = runs_figure({"mine": found}, "bits_per_byte").axes[0].lines[1]
    assert np.isnan(training.get_ydata()).tolist() == [False, True, False, False]
    figure = runs_figure({"mine": rows(2.0)}, "loss_scale")
    assert [text.get_text() for text in labels_of(figure)] == ["training 3932160"]
    assert figure.axes[0].get_yscale() == "log"


def test_a_run_without_the_metric_is_refused_with_what_it_has() -> None:
    with pytest.raises(ValueError, match=r"^b has no value of bits_per_byte; its columns are step, bits_per_"):
        runs_figure({"a": rows(2.0), "b": rows(2.0, name="bits_per_target_byte")}, "bits_per_byte")


def write(folder: Path, found: Rows) -> str:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(folder)


def plot(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["jaxllm plot", *arguments])
    return plot_runs.main()


def test_the_picture_at_the_end_of_a_run_is_that_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from matplotlib.image import imread

    run = write(tmp_path / "mine", rows(2.0))
    target = tmp_path / "by_command.png"
    assert plot(monkeypatch, run, "--out", str(target)) == 0
    assert capsys.readouterr().out == f"{target}\n"
    np.testing.assert_array_equal(imread(plot_curve(tmp_path / "mine", {})), imread(target))


def test_the_command_takes_what_all_runs_have_and_names_them_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = {}
    monkeypatch.setattr("jaxllm.run.record.line_figure", lambda lines, y, **_: drawn.update({y: lines}) or Picture())
    first, second = write(tmp_path / "a" / "small", rows(2.0)), write(tmp_path / "b" / "small", rows(3.0))
    assert plot(monkeypatch, first, second, "--out", str(tmp_path / "x.svg")) == 0
    assert [label for label, *_ in drawn["bits per byte"] if label] == ["a/small 2.5", "b/small 3.5"]
    third = write(tmp_path / "t5", rows(3.0, name="bits_per_target_byte"))
    assert plot(monkeypatch, first, third) == 0 and "loss (nats per token)" in drawn
    assert plot(monkeypatch, third) == 0 and "bits per target byte" in drawn
    assert plot(monkeypatch, first, "--metric", "loss_scale") == 0 and "loss scale" in drawn


class Picture:
    def savefig(self, path: str, dpi: int) -> None:
        assert path and dpi


def test_mistakes_are_errors_with_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write(tmp_path / "mine", rows(2.0))
    cases = {
        (str(tmp_path),): "has no metrics.jsonl; give the folder of a run",
        (run, f"{run}/"): "a run is given twice",
        (run, "--metric", "los"): "mine has no value of los; its columns are step, bits_per_byte",
        (run, "--out", str(tmp_path / "x.foo")): "Format 'foo' is not supported",
        (run, "--out", str(tmp_path / "no" / "x.png")): "No such file or directory",
    }
    for arguments, message in cases.items():
        assert plot(monkeypatch, *arguments) == 2
        assert message in capsys.readouterr().err
