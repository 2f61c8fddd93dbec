"""Preparing a corpus next to another run, on a disk that fills up, or after an interrupted start."""

from __future__ import annotations

import gzip
import json
import random
import re
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

from jaxllm.config import DataConfig
from jaxllm.data import DataError
from jaxllm.data.builders import FilesText, ProblemLog
from jaxllm.data.records import texts
from jaxllm.data.sources import open_source
from jaxllm.run.feed import build_pipeline
from tests.conftest import full_disk, unreadable, write_corpus


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
            with pytest.raises(DataError, match=rf"folder {run} is in data.path {corpus}.*; choose a training.run_dir"):
                build_pipeline(config, vocab_size=400, batch_size=2, seed=0, run_dir=run)
            assert not (run / "data").exists()
    # Prepared data are not documents: only a run writes such files.
    config = files(corpus, cache_dir=str(corpus / "cache"))
    first, again = (open_source(config, cache_dir=corpus / "cache") for _ in range(2))
    assert first.name == again.name and list(texts(first.train, "text")) == list(texts(again.train, "text"))


@pytest.mark.parametrize("change", [-1, 1])
def test_another_number_of_documents_than_the_files_hold_is_refused(corpus: Path, tmp_path: Path, change: int) -> None:
    """With fewer in dataset_info.json the last documents would never be read, silently."""
    open_source(files(corpus), cache_dir=tmp_path / "cache")
    (info,) = (tmp_path / "cache").rglob("dataset_info.json")
    written = json.loads(info.read_text())
    for split in written["splits"]:
        split["shardLengths"] = [str(int(length) + change) for length in split["shardLengths"]]
    info.write_text(json.dumps(written))
    with pytest.raises(DataError, match=r"damaged \(\S+ holds \d+ documents, dataset_info.json has \d+\); remove that"):
        open_source(files(corpus), cache_dir=tmp_path / "cache")


def test_a_split_of_another_name_is_refused(corpus: Path, tmp_path: Path) -> None:
    """Without the split of held-out documents, some of the others would be held out in their place."""
    open_source(files(corpus), cache_dir=tmp_path / "cache")
    (info,) = (tmp_path / "cache").rglob("dataset_info.json")
    info.write_text(info.read_text().replace('"validation"', '"vilidation"'))
    with pytest.raises(DataError, match=r"has the splits train, vilidation, not train and validation\); remove that"):
        open_source(files(corpus), cache_dir=tmp_path / "cache")


def test_what_may_not_be_read_is_not_called_damaged(open_folder: Path) -> None:
    write_corpus(corpus := open_folder / "corpus")
    (cache := open_folder / "cache").mkdir()
    cache.chmod(0o777)
    (corpus / "sub").mkdir()
    for place in (corpus / "07.txt", corpus / "sub"):
        with unreadable(place), pytest.raises(DataError, match=rf"^{place} cannot be read: Permission denied; make it"):
            open_source(files(corpus), cache_dir=cache)
    open_source(files(corpus), cache_dir=cache)
    for name in ("*-train.array_record*", "dataset_info.json"):
        (file,) = cache.rglob(name)
        with unreadable(file), pytest.raises(DataError, match=rf"^{file} cannot be read: Permission denied; make it"):
            open_source(files(corpus), cache_dir=cache)


def test_a_damaged_page_of_parquet_is_found_where_it_has_a_checksum(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    corpus = tmp_path / "corpus"
    corpus.mkdir()
    table = pa.table({"text": [f"document {i} is about numbers" for i in range(200)]})
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(table, corpus / "x.parquet", **options)
    data = (corpus / "x.parquet").read_bytes()
    (corpus / "x.parquet").write_bytes(data.replace(b"document 150 ", b"document 15O "))
    with pytest.raises(
        DataError, match=r"x.parquet cannot be read after row 0 \(.*CRC.*\); repair it or set data.on_bad"
    ):
        open_source(files(corpus), cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("place", "words"), [("_open_lines", "x.jsonl holds a document too large"), ("content_hash", "")]
)
def test_memory_that_ends_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, words: str
) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}')

    def out_of_memory(*args: object) -> NoReturn:
        raise MemoryError

    monkeypatch.setattr(f"jaxllm.data.builders.{place}", out_of_memory)
    with pytest.raises(DataError, match=words or "needs more memory to be prepared than this machine has free; end"):
        open_source(files(tmp_path / "x.jsonl"), cache_dir=tmp_path / "cache")


def compressed(folder: Path) -> dict[str, bytes]:
    """A small corpus in each format."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    texts = [f"document {i}: " + " ".join(str(i * j) for j in range(40)) for i in range(60)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    pq.write_table(pa.table({"text": texts}), folder / "whole.parquet", write_page_checksum=True)
    return {
        ".jsonl": lines,
        ".jsonl.gz": gzip.compress(lines),
        ".jsonl.zst": zstandard.ZstdCompressor(write_checksum=True).compress(lines),
        ".parquet": (folder / "whole.parquet").read_bytes(),
    }


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Cut, one bit flipped, a stretch zeroed, doubled or removed."""
    start = rng.randrange(len(data))
    stop = min(start + rng.choice([1, 64, 4096]), len(data))
    middle = {
        "cut": lambda: b"",
        "flip": lambda: bytes([data[start] ^ 1 << rng.randrange(8)]) + data[start + 1 :],
        "zero": lambda: bytes(stop - start) + data[stop:],
        "double": lambda: data[start:stop] + data[start:],
        "remove": lambda: data[stop:],
    }[rng.choice(["cut", "flip", "zero", "double", "remove"])]
    return data[:start] + middle()


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_mutated_files_are_refused_by_name_or_read(suffix: str, tmp_path: Path) -> None:
    """50 of each: no error but `DataError`, which names the file; what has a checksum never gives other documents."""
    rng, whole = random.Random(24), compressed(tmp_path)[suffix]
    path = tmp_path / f"x{suffix}"
    path.write_bytes(whole)
    wanted = set(documents(path, stop=True))
    for i in range(50):
        path.write_bytes(mutated(whole, rng))
        for stop in (True, False):
            try:
                found = documents(path, stop=stop)
            except DataError as error:
                assert str(path) in str(error)
                continue
            if stop and suffix != ".jsonl":
                assert wanted.issuperset(found), i


def documents(path: Path, *, stop: bool) -> list[str]:
    """Texts as they would be prepared."""
    problems = ProblemLog(stop=stop)
    builder = FilesText.for_path(path.parent / "cache", files(path), problems)
    return [fields["text"] for _, fields in builder._documents()]


def test_mutated_prepared_data_is_refused_by_name_or_read(corpus: Path, tmp_path: Path) -> None:
    """60 of them: no error but `DataError`, and never fewer or other documents."""
    rng, cache = random.Random(24), tmp_path / "cache"
    wanted = prepared(corpus, cache)
    targets = sorted(path for path in cache.rglob("1.0.0/*") if path.is_file())
    assert len(targets) == 4
    refused = 0
    for _ in range(60):
        path = rng.choice(targets)
        whole = path.read_bytes()
        used = whole[: max(len(whole.rstrip(b"\0")), 1)]  # array_record ends in zeros that nothing reads
        path.write_bytes(mutated(used, rng) + whole[len(used) :])
        try:
            assert prepared(corpus, cache) == wanted
        except DataError as error:
            assert str(cache) in str(error)
            refused += 1
        path.write_bytes(whole)
    assert refused > 20


def prepared(corpus: Path, cache: Path) -> tuple[list[str], ...]:
    source = open_source(files(corpus), cache_dir=cache)
    return tuple(list(texts(records, "text")) for records in (source.train, source.validation))
