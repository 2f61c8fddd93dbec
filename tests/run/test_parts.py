"""Custom parts of a run: the examples of docs/parts.md, and that parts change nothing but what they replace."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

from jaxllm.data import BatchError
from jaxllm.data.sources import Source
from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.data.workers import EncodedStream
from jaxllm.generation.text import TextModel
from jaxllm.ops.losses import LossSums
from jaxllm.run.load import load_run
from jaxllm.run.parts import StepReport
from jaxllm.run.samples import SAMPLING
from jaxllm.run.start import TrainingStopped
from jaxllm.run.trainer import pretrain
from jaxllm.storage.checkpoint_reading import CheckpointError
from jaxllm.storage.folder import RunFolderError
from jaxllm.training.loss import build_loss
from jaxllm.training.optimizer import build_optimizer
from tests.conftest import write_corpus
from tests.run.test_pretrain import config, final_params, losses

GUIDE = (Path(__file__).parent.parent.parent / "docs" / "parts.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.+?)```", GUIDE, flags=re.S)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    write_corpus(folder / "corpus")
    return folder


def test_the_guide_to_parts_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "texts")
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) == 8 and all(block.count("\n") <= 40 for block in BLOCKS)
    exec(compile("\n".join(BLOCKS), "docs/parts.md", "exec", dont_inherit=True), {"__name__": "guide"})
    assert json.loads(Path("runs/smoothed/parts.json").read_text()) == {"loss": "guide.smoothed"}  # not from a file
    assert not Path("runs/watched/parts.json").exists()


def twice(model, training):
    plain = build_loss(model, training)

    def loss(params, batch, key):
        return LossSums(*(2 * x for x in plain(params, batch, key)))

    return loss


def test_the_same_parts_make_the_same_run_and_callbacks_change_nothing(shared: Path) -> None:
    run = config(shared / "plain", shared / "corpus", training={"steps": 4})
    pretrain(run)
    own = config(shared / "own", shared / "corpus", training={"steps": 4})
    rule = build_optimizer(own.optimizer, own.precision, steps=4)
    reports: list[tuple[StepReport, jax.Array]] = []

    def on_step(report: StepReport) -> None:
        reports.append((report, report.state().params["final_norm"]["weight"]))

    pretrain(own, optimizer=rule, loss=build_loss, on_step=on_step, stop_at=2)
    with pytest.raises(RunFolderError, match=r"(?s)other parts.*  loss: .*build_loss sha256:\w+ -> of the config"):
        pretrain(own)
    summary = pretrain(own, optimizer=rule, loss=build_loss, on_step=on_step)
    for a, b in zip(final_params(run), final_params(own), strict=True):
        np.testing.assert_array_equal(a, b)
    assert [report.step for report, _ in reports] == [1, 2, 3, 4]
    assert losses(run) == losses(own) == {report.step: report.metrics.loss for report, _ in reports}
    assert [row["step"] for row in summary.metrics if "loss" in row] == [1, 2, 3, 4]
    assert all(np.isfinite(np.asarray(weight)).all() for _, weight in reports)  # copies, which no step overwrites


def unrotated(model: Any) -> Any:
    return model.clone(rotate=lambda x, positions: x)


def test_a_changed_model_is_that_of_training_evaluation_and_sample(shared: Path) -> None:
    """The same training as with a loss that clones the model; the sample uses the changed model, too."""
    text = {"steps": 2, "sample_tokens": 8, "sample_prompt": "line"}
    runs = {name: config(shared / name, shared / "corpus", training=text) for name in ("model", "model_by_loss")}
    summary = pretrain(runs["model"], model=unrotated, stop_at=1)
    with pytest.raises(RunFolderError, match=r"model: .*unrotated.* -> of the config"):
        pretrain(runs["model"])
    summary = pretrain(runs["model"], model=unrotated)
    by_loss = pretrain(runs["model_by_loss"], loss=lambda model, training: build_loss(unrotated(model), training))
    assert losses(runs["model"]) == losses(runs["model_by_loss"]) != {}
    assert summary.validation == by_loss.validation
    model, params = load_run(summary.folder)
    text_model = TextModel.of(unrotated(model), params, load_tokenizer(summary.folder / "tokenizer.json"))
    ids = [text_model.encode("line")]
    (new,) = text_model.generate(ids, max_new_tokens=8, sampling=SAMPLING, seed=runs["model"].training.seed)
    assert (summary.folder / "sample.txt").read_text() == text_model.decode([*ids[0], *new])


def outside(model: Any, training: Any) -> Any:
    """A loss whose first target is outside the vocabulary, as -100 of other libraries is."""
    plain = build_loss(model, training)
    return lambda params, batch, key: plain(params, batch | {"targets": batch["targets"].at[0, 0].set(-100)}, key)


@pytest.mark.parametrize("loss_scale", ["none", "dynamic"])
def test_a_loss_that_is_nan_stops_a_run_although_its_gradients_are_finite(shared: Path, loss_scale: str) -> None:
    run = config(shared / f"nan-{loss_scale}", shared / "corpus", precision={"loss_scale": loss_scale})
    with pytest.raises(TrainingStopped, match=r"in the vocabulary: loss nan, gradient norm [0-9.]+, .* at step 1;"):
        pretrain(run, loss=outside)


def test_parts_are_inside_the_loss_scale_and_accepted_on_request(shared: Path) -> None:
    half = {"compute": "float16", "loss_scale": "dynamic"}
    run = config(shared / "half", shared / "corpus", training={"steps": 2}, precision=half)
    summary = pretrain(run, optimizer=optax.sgd(0.1), loss=twice, stop_at=1)
    assert summary.metrics[0]["loss_scale"] == 65536 and summary.metrics[0]["learning_rate"] is None
    assert pretrain(run, accept_other_parts=True, optimizer=optax.sgd(0.1)).finished


def test_another_optimizers_state_is_named_with_the_fix(shared: Path) -> None:
    """Also in runs with the leaf of earlier versions, a loss scale and an average: only their rule is compared."""
    half: dict[str, Any] = {"precision": {"compute": "float16", "loss_scale": "dynamic"}, "optimizer": {"ema": 0.5}}
    run = config(shared / "other", shared / "corpus", training={"steps": 2}, **half)
    pretrain(run, optimizer=optax.sgd(0.1), stop_at=1)
    fix = rf"training.init_from={shared / 'other'}, which takes the parameters alone"
    for other in (optax.adam(0.1), optax.sgd(0.1, momentum=0.9)):
        with pytest.raises(CheckpointError, match=rf"checkpoint 1 in .* holds the state of another optimizer .*{fix}"):
            pretrain(run, accept_other_parts=True, optimizer=other)
    again = {"steps": 1, "init_from": str(shared / "other")}
    tokenizer = {"tokenizer": str(shared / "other" / "tokenizer.json")}
    start = config(shared / "from_other", shared / "corpus", training=again, data=tokenizer)
    assert pretrain(start, optimizer=optax.adam(0.1)).finished
    assert pretrain(run, optimizer=optax.sgd(0.1)).finished


class Numbers:
    """A stream, of `last` documents where that is given; its state is an object that it changes."""

    def __init__(self, last: int = 10**9) -> None:
        self.state, self.last = {"count": 0}, last

    def __next__(self) -> dict[str, str]:
        if self.state["count"] == self.last:
            raise StopIteration
        self.state["count"] += 1
        count = self.state["count"]
        return {"text": f"{count} times {count % 7} is {count * (count % 7)}. " * 3}

    def get_state(self) -> dict[str, int]:
        return self.state

    def set_state(self, state: dict[str, int]) -> None:
        self.state = dict(state)


def test_a_position_is_a_copy_of_a_streams_state() -> None:
    iterator = iter(EncodedStream(Numbers(), lambda record: {"size": np.array(len(record["text"]))}))
    next(iterator)
    position = iterator.get_state()
    after = [next(iterator)["size"] for _ in range(3)]
    iterator.set_state(position)
    assert [next(iterator)["size"] for _ in range(3)] == after and position == {"stream": {"count": 1}}


def test_damaged_records_of_parts_and_a_run_that_is_done_are_named(shared: Path) -> None:
    run = config(shared / "done", shared / "corpus", training={"steps": 4}, optimizer={"schedule": "constant"})
    wanted = {"seen": jax.numpy.float32(1.5), "loss": 0.0, "step": 9}
    summary = pretrain(run, on_evaluate=lambda step, metrics, params: wanted)  # a number of jax; names that are taken
    assert summary.validation["seen"] == 1.5 and summary.validation["loss"] > 0 and summary.validation["step"] == 4
    shorter = config(shared / "done", shared / "corpus", training={"steps": 3}, optimizer={"schedule": "constant"})
    with pytest.raises(RunFolderError, match=r"(?s)training.steps: 4 -> 3.*4 steps are done"):
        pretrain(shorter)
    (shared / "done" / "parts.json").write_text("")
    with pytest.raises(RunFolderError, match=r"parts.json is damaged; pass accept_other_parts=True"):
        pretrain(run)
    assert pretrain(run, accept_other_parts=True).finished


def test_a_stream_resumes_where_it_was_and_may_not_end(shared: Path) -> None:
    held_out = [{"text": "1 times 2 is 2."}] * 4
    tokenizer = {"tokenizer": str(shared / "made" / "tokenizer.json")}
    pretrain(config(shared / "made", shared / "corpus", training={"steps": 1}))
    runs = [config(shared / name, shared / "corpus", data=tokenizer) for name in ("long", "short")]
    pretrain(runs[0], source=Source("numbers", Numbers(), held_out))
    pretrain(runs[1], source=Source("numbers", Numbers(), held_out), stop_at=3)
    pretrain(runs[1], source=Source("numbers", Numbers(), held_out))
    assert losses(runs[0]) == losses(runs[1]) and len(losses(runs[0])) == 8
    ended = config(shared / "ended", shared / "corpus", data=tokenizer)
    with pytest.raises(BatchError, match="source numbers has ended"):
        pretrain(ended, source=Source("numbers", Numbers(last=10), held_out))
    untold = config(shared / "untold", shared / "corpus")
    with pytest.raises(ValueError, match=r"data\.tokenizer.*a stream without end"):
        pretrain(untold, source=Source("numbers", Numbers(), held_out))


def test_python_shows_the_log_where_nobody_listens(
    shared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(config(shared / "shown", shared / "corpus", training={"steps": 1}))
    assert "step 1 " not in capsys.readouterr().out  # pytest listens
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.WARNING)
    pretrain(config(shared / "shown2", shared / "corpus", training={"steps": 1}))
    assert "step 1 " in capsys.readouterr().out


def test_what_libraries_add_to_the_log_at_their_import_does_not_count() -> None:
    """In a new interpreter, where the trainer's imports find no handler."""
    code = """if True:
        import logging, jaxllm, jaxllm.run.trainer
        from jaxllm.run.console import nobody_listens
        assert nobody_listens(), logging.root.handlers
        logging.basicConfig(level=logging.ERROR, force=True)
        assert not nobody_listens()
        logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
        assert not nobody_listens()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
