"""The layout of a run folder: what a folder is, and which tokenizer it keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxllm.config import DataConfig
from jaxllm.data import DataError
from jaxllm.data.tokenizer import load_tokenizer, train_tokenizer
from jaxllm.run.feed import build_pipeline
from jaxllm.storage.folder import Kind, kind_of


def test_a_folder_is_a_run_a_hugging_face_directory_or_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert kind_of(tmp_path) is None and kind_of(tmp_path / "missing") is None
    (tmp_path / "config.json").write_text("{}")
    assert kind_of(tmp_path) is Kind.HUGGING_FACE
    (tmp_path / "config.yaml").write_text("")
    assert kind_of(tmp_path) is kind_of("~") is Kind.RUN


@pytest.mark.parametrize("first", ["train", "given", "by hand"])
def test_a_run_keeps_its_tokenizer(corpus: Path, tmp_path: Path, first: str) -> None:
    """A look at data with other settings must not leave its tokenizer to a run, nor replace the run's."""
    tokenizer = train_tokenizer(["the quick brown fox jumps over the lazy dog\n" * 9], vocab_size=420)
    tokenizer.save(tmp_path / "given.json")
    train_tokenizer(["some other text"], vocab_size=400).save(tmp_path / "other.json")
    settings = {"cache_dir": str(tmp_path / "cache"), "source": "files", "path": str(corpus)}
    run_dir = tmp_path / "run"

    def opened(vocab_size: int = 448, **changes: object) -> str:
        config = DataConfig(**settings, **changes)
        pipeline = build_pipeline(config, vocab_size=vocab_size, batch_size=4, seed=0, run_dir=run_dir)
        return pipeline.tokenizer.fingerprint

    own = {"tokenizer": str(tmp_path / "given.json")} if first == "given" else {}
    others = {
        r"fingerprint \w+ -> \w+": lambda: opened(tokenizer=str(tmp_path / "other.json")),
        "vocab_size 448 -> 440": lambda: opened(440),
        r"source files_text/files-\w+/1.0.0 -> files_text/files-\w+/1.0.0, doc": lambda: opened(
            validation_fraction=0.4
        ),
        "source None -> files_text/": lambda: opened(),
    }
    expected = {"train": [0, 1, 2], "given": [0, 3], "by hand": [0]}[first]
    if first == "by hand":
        tokenizer.save(run_dir / "tokenizer.json")
    made = opened(**own)
    if first != "by hand":
        for i in expected:  # until the run has made a step its folder follows the config
            before = (run_dir / "tokenizer_origin.json").read_text()
            list(others.values())[i]()
            assert (run_dir / "tokenizer_origin.json").read_text() != before
            assert opened(**own) == made
        (run_dir / "metrics.jsonl").write_text('{"step": 1}')
    for i in expected:
        with pytest.raises(DataError, match=rf"tokenizer.json is not the tokenizer of this config \({list(others)[i]}"):
            list(others.values())[i]()
    assert load_tokenizer(run_dir / "tokenizer.json").fingerprint == made == opened(**own)
    assert opened(tokenizer=str(run_dir / "tokenizer.json")) == made
    if first == "given":  # which it outlives
        (tmp_path / "given.json").unlink()
        assert opened(**own) == made
    if first == "train":
        (run_dir / "tokenizer_origin.json").write_text("{")
        with pytest.raises(DataError, match=r"tokenizer_origin.json is damaged; remove it if"):
            opened()


def test_no_tokenizer_is_trained_for_checkpoints_that_know_one(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "0").mkdir(parents=True)
    with pytest.raises(DataError, match="holds a run whose tokenizer is not there any more"):
        build_pipeline(
            DataConfig(source="files", path=str(corpus)), vocab_size=420, batch_size=4, seed=3, run_dir=tmp_path / "run"
        )


@pytest.mark.parametrize("earlier", [False, True])
def test_a_lost_tokenizer_is_made_again_if_the_checkpoints_hold_its_fingerprint(
    corpus: Path, tmp_path: Path, earlier: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Earlier versions kept the position alone."""
    run, file = tmp_path / "run", tmp_path / "run" / "tokenizer.json"

    def opened(vocab_size: int) -> str:
        config = DataConfig(source="files", path=str(corpus), cache_dir=str(tmp_path / "cache"))
        return build_pipeline(config, vocab_size=vocab_size, batch_size=4, seed=0, run_dir=run).tokenizer.fingerprint

    made = opened(448)
    text = file.read_bytes()
    position = {"tokenizer": made, "iterator": {}}
    (run / "checkpoints" / "2" / "data").mkdir(parents=True)
    (run / "checkpoints" / "2" / "data" / "metadata").write_text(
        json.dumps(position if earlier else {"position": position})
    )
    file.unlink()
    with pytest.raises(DataError, match=rf"not {made}\); restore tokenizer.json from a backup"):
        opened(440)
    assert not file.exists()
    with caplog.at_level("INFO", logger="jaxllm"):
        assert opened(448) == made
    assert file.read_bytes() == text and caplog.text.count("was lost and is made again") == 1
