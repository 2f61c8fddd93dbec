"""Preparing a corpus where something else continues: another run, a disk that fills up, an earlier start."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from jaxllm.config import DataConfig
from jaxllm.data import DataError
from jaxllm.data.builders import FilesText
from jaxllm.data.records import texts
from jaxllm.data.sources import open_source
from jaxllm.run.feed import build_pipeline
from tests.conftest import full_disk


def files(corpus: Path, **settings) -> DataConfig:
    return DataConfig(source="files", path=str(corpus), validation_fraction=0.3, **settings)


def test_the_second_of_two_that_prepare_one_corpus_opens_it(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = FilesText._documents

    def overtaken(self: FilesText):
        monkeypatch.setattr(FilesText, "_documents", documents)
        open_source(files(corpus), cache_dir=tmp_path / "cache")
        yield from documents(self)

    monkeypatch.setattr(FilesText, "_documents", overtaken)
    source = open_source(files(corpus), cache_dir=tmp_path / "cache")
    assert len(source.train) + len(source.validation) == 40
    (prepared,) = (tmp_path / "cache" / "files_text").glob("*/*")  # and nothing that is incomplete
    assert prepared.name == "1.0.0"


def test_a_full_disk_is_named_wherever_it_fills(corpus: Path, tmp_path: Path) -> None:
    for size in (0, 2000):  # in the first file; in that of the documents, which array_record writes
        with full_disk(size), pytest.raises(DataError, match=r"cannot prepare files in .*; set data.cache_dir to"):
            open_source(files(corpus), cache_dir=tmp_path / "cache")
    source = open_source(files(corpus), cache_dir=tmp_path / "cache")
    assert len(source.train) + len(source.validation) == 40


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json", "skipped.json", "*-train.array_record*"])
def test_damaged_data_is_named_and_can_be_prepared_again(name: str, corpus: Path, tmp_path: Path) -> None:
    (corpus / "bad.txt").write_bytes(b"\xff\xfe")
    config = files(corpus, on_bad_text="skip")
    open_source(config, cache_dir=tmp_path / "cache")
    (file,) = (tmp_path / "cache").rglob(name)
    file.write_text("")  # as a loss of power leaves it
    with pytest.raises(
        DataError, match=rf"prepared in {file.parent.parent}/?\S* is damaged .*; remove that folder"
    ) as stop:
        open_source(config, cache_dir=tmp_path / "cache")
    folder = Path(re.findall(r"prepared in (\S+) is", str(stop.value))[0])
    assert folder in (file.parent, file.parent.parent)  # of this dataset alone
    shutil.rmtree(folder)
    assert len(open_source(config, cache_dir=tmp_path / "cache").train) > 0


def test_every_start_names_what_is_skipped(corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (corpus / "bad.txt").write_bytes(b"\xff\xfe")
    for _ in range(2):
        caplog.clear()
        with caplog.at_level("WARNING", logger="jaxllm"):
            open_source(files(corpus, on_bad_text="skip"), cache_dir=tmp_path / "cache")
        assert caplog.messages == [f"skipped {corpus / 'bad.txt'} is not UTF-8 (byte 0)"]


def test_a_run_within_its_corpus_is_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(corpus)
    for run in (corpus, corpus / "runs" / "a", tmp_path / "link" / "a"):
        for config in (files(corpus), files(corpus, cache_dir=str(tmp_path / "cache"))):
            with pytest.raises(
                DataError, match=rf"folder {run} lies in data.path {corpus}.*; choose a training.run_dir"
            ):
                build_pipeline(config, vocab_size=400, batch_size=2, seed=0, run_dir=run)
            assert not (run / "data").exists()
    # What is prepared is no document: only a run writes such files.
    config = files(corpus, cache_dir=str(corpus / "cache"))
    first, again = (open_source(config, cache_dir=corpus / "cache") for _ in range(2))
    assert first.name == again.name and list(texts(first.train, "text")) == list(texts(again.train, "text"))
