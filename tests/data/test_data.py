"""The data layer: lossless text, exact packing, exact resume, and every complaint by name."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import math
import multiprocessing
import os
import pickle
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers

from jaxllm.config import DataConfig
from jaxllm.data import DataError
from jaxllm.data.builders import content_hash
from jaxllm.data.pipeline import Pipeline, simple_baselines
from jaxllm.data.records import Records, field, texts
from jaxllm.data.sources import Source, open_source
from jaxllm.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from jaxllm.run.feed import build_pipeline
from tests.conftest import unreadable


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    sentences = [f"the quick brown fox {i} jumps over </s> the lazy dog <extra_id_0>\n" * 3 for i in range(50)]
    return train_tokenizer(iter(sentences), vocab_size=500)


def open_pipeline(corpus: Path, run_dir: Path, **changes: object) -> Pipeline:
    run_dir.mkdir(exist_ok=True)
    options = {
        "source": "files",
        "path": str(corpus),
        "sequence_length": 32,
        "validation_fraction": 0.2,
        **changes,
    }
    return build_pipeline(DataConfig(**options), vocab_size=420, batch_size=4, seed=3, run_dir=run_dir)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=80) | st.sampled_from(["</s>", "a<pad>b", "<extra_id_0> <extra_id_99>", "<unk>"]))
def test_round_trip_is_exact_and_never_special(tokenizer: Tokenizer, text: str) -> None:
    for each in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        ids = each.encode(text)
        assert each.decode(ids) == text
        assert not np.isin(ids, [0, 1, 2, *each.sentinel_ids]).any()
        assert each.token_bytes[ids].sum() == len(text.encode())


def test_saved_tokenizer_keeps_the_rule(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.decode(loaded.encode("</s>")) == "</s>" and 1 not in loaded.encode("</s>")


@pytest.mark.parametrize("padding", [{"length": 64}, {"pad_to_multiple_of": 8}, {}])
def test_padding_and_truncation_of_a_file_do_not_reach_a_text(
    tokenizer: Tokenizer, tmp_path: Path, padding: dict[str, int]
) -> None:
    fast = FastTokenizer.from_str(tokenizer._fast.to_str())
    fast.enable_padding(direction="left", **padding)
    fast.save(str(tmp_path / "padded.json"))
    fast.enable_truncation(2)
    fast.save(str(tmp_path / "truncated.json"))
    for name in ("padded", "truncated"):
        found = load_tokenizer(tmp_path / f"{name}.json")
        assert found.encode("the cat sat on the mat").tolist() == tokenizer.encode("the cat sat on the mat").tolist()
    if not padding:  # it changed no run, so that a run's tokenizer stays known by it
        whole = hashlib.sha256((FastTokenizer.from_file(str(tmp_path / "padded.json"))).to_str().encode()).hexdigest()
        assert load_tokenizer(tmp_path / "padded.json").fingerprint == whole[:12]


def test_paths_may_be_strings_and_folders_new(corpus: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(str(tmp_path / "new" / "tokenizer.json"))
    config = DataConfig(source="files", path=str(corpus), tokenizer=str(tmp_path / "new" / "tokenizer.json"))
    pipeline = build_pipeline(config, vocab_size=500, batch_size=4, seed=0, run_dir=str(tmp_path / "a" / "run"))
    assert pipeline.tokenizer.fingerprint == load_tokenizer(str(tmp_path / "a" / "run" / "tokenizer.json")).fingerprint


def test_a_pattern_that_does_not_end_is_a_complaint(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The library panics, which is a BaseException with a trace of Rust."""
    tokenizer.save(path := tmp_path / "tokenizer.json")
    raw = json.loads(path.read_text())
    raw["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    path.write_text(json.dumps(raw))
    with pytest.raises(
        DataError, match=r"the tokenizer fails on text that begins with 'aaaa.*retry-limit.*; use another"
    ):
        load_tokenizer(path).encode("a" * 40 + "!")


def test_a_tokenizer_that_may_not_be_read_is_not_called_damaged(open_folder: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(path := open_folder / "tokenizer.json")
    with unreadable(path), pytest.raises(DataError, match=rf"{path} cannot be read: Permission denied; check its"):
        load_tokenizer(path)


def test_a_text_is_not_taken_for_texts() -> None:
    with pytest.raises(DataError, match="texts must be many texts, got one str; put it into a list"):
        train_tokenizer("a corpus in one string", vocab_size=500)


@pytest.mark.parametrize("objective", ["causal", "span_corruption"])
def test_a_tiny_corpus_is_read_a_few_times_before_the_first_batch(tmp_path: Path, objective: str) -> None:
    """A window of a million tokens would take minutes to fill from three short documents."""
    (tmp_path / "corpus").mkdir()
    for i in range(12):
        (tmp_path / "corpus" / f"{i}.txt").write_text(f"Grüße Nr. {i} aus 東京", encoding="utf-8")
    pipeline = open_pipeline(tmp_path / "corpus", tmp_path / "run", objective=objective, validation_fraction=0.5)
    read, encode = [], pipeline.tokenizer.encode
    pipeline.tokenizer.encode = lambda text: read.append(text) or encode(text)
    batch = next(pipeline)
    assert len(batch["targets"]) == 4 and len(read) < 500
    assert len(set(read)) == len(pipeline._source.train)


def test_special_ids(tokenizer: Tokenizer) -> None:
    assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)
    size = tokenizer.vocab_size
    assert tokenizer.sentinel_ids.tolist() == list(range(size - 1, size - 101, -1))
    assert tokenizer.token_bytes[[0, 1, 2, size - 1]].tolist() == [0, 0, 0, 0]


def rebuild(batches: list[dict[str, np.ndarray]]) -> list[tuple[list[int], list[int]]]:
    """Inputs and targets of every segment, in order."""
    found = []
    for batch in batches:
        for row in range(len(batch["tokens"])):
            for segment in range(1, batch["segment_ids"][row].max() + 1):
                inside = batch["segment_ids"][row] == segment
                assert batch["positions"][row][inside].tolist() == list(range(inside.sum()))
                found.append((batch["tokens"][row][inside].tolist(), batch["targets"][row][inside].tolist()))
    return found


def test_validation_rows_hold_every_document_exactly(corpus: Path, tmp_path: Path) -> None:
    pipeline = open_pipeline(corpus, tmp_path / "run")
    batches = list(pipeline.validation(1000))
    for inputs, targets in rebuild(batches):
        assert inputs[1:] == targets[:-1]
    weight = sum(batch["weights"].sum() for batch in batches)
    documents = [pipeline.tokenizer.encode(text) for text in texts(pipeline._source.validation, "text")]
    assert weight == sum(len(ids) + 1 for ids in documents)
    size = sum(pipeline.tokenizer.token_bytes[b["targets"]][b["weights"] > 0].sum() for b in batches)
    assert size == sum(len(text.encode()) for text in texts(pipeline._source.validation, "text"))
    again = list(pipeline.validation(1000))
    for a, b in zip(batches, again, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_baselines_are_what_they_say(corpus: Path, tmp_path: Path) -> None:
    pipeline = open_pipeline(corpus, tmp_path / "run")
    source = open_source(pipeline._config, cache_dir=tmp_path / "run" / "data")
    held_out = list(texts(source.validation, "text"))
    size = sum(len(text.encode()) for text in held_out)
    ids = np.concatenate([pipeline.tokenizer.encode(text) for text in texts(source.train, "text")])
    counts = np.bincount(ids, minlength=pipeline.tokenizer.vocab_size) + 1
    bits = sum(np.log2(counts.sum() / counts[pipeline.tokenizer.encode(text)]).sum() for text in held_out)
    strongest = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    packed = sum(len(lzma.compress(text.encode(), format=lzma.FORMAT_RAW, filters=strongest)) for text in held_out)
    assert pipeline.baselines() == {"unigram": pytest.approx(bits / size), "lzma": 8 * packed / size}


def test_baselines_read_only_the_beginning_of_a_long_document(tokenizer: Tokenizer) -> None:
    """A validation file of 500 MB is one document, and xz would work on it for minutes."""
    text = "a line of a log\n" * 2**18
    lengths = []

    class Watched:
        vocab_size = tokenizer.vocab_size

        def encode(self, text: str) -> np.ndarray:
            lengths.append(len(text))
            return tokenizer.encode(text)

    found = simple_baselines(Source("log", [{"text": text}], [{"text": text}]), Watched(), "text")
    assert lengths == [2**20, 2**20] and 0 < found["lzma"] < found["unigram"]
    short = Source("log", [{"text": text[: 2**20]}], [{"text": text[: 2**20]}])
    assert simple_baselines(short, tokenizer, "text") == found


def test_records_are_a_sequence(corpus: Path, tmp_path: Path) -> None:
    """Iteration ends at the last record; one that is beyond it is not called damaged."""
    config = DataConfig(source="files", path=str(corpus), validation_fraction=0.2)
    records = open_source(config, cache_dir=tmp_path).train
    assert isinstance(records, Records) and len(list(records)) == len(records) > 1
    assert records[-1] == records[len(records) - 1]
    with pytest.raises(IndexError):
        records[len(records)]


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact(corpus: Path, tmp_path: Path, workers: int) -> None:
    pipeline = open_pipeline(corpus, tmp_path / "run", workers=workers)
    for _ in range(5):
        next(pipeline)
    state = json.loads(json.dumps(pipeline.get_state()))
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)  # as a terminal's Ctrl-C does, in addition to the main process
    want = [next(pipeline) for _ in range(6)]
    pipeline.close()
    resumed = open_pipeline(corpus, tmp_path / "run", workers=workers)
    resumed.set_state(state)
    for batch in want:
        again = next(resumed)
        for name in batch:
            np.testing.assert_array_equal(again[name], batch[name])
    resumed.close()


def test_state_of_other_data_is_refused(corpus: Path, tmp_path: Path) -> None:
    state = open_pipeline(corpus, tmp_path / "run").get_state()
    with pytest.raises(DataError, match="the checkpoint was made with"):
        open_pipeline(corpus, tmp_path / "other", validation_fraction=0.3).set_state(state)


def test_split_is_by_content_and_complete(corpus: Path, tmp_path: Path) -> None:
    (corpus / "copy.txt").write_text((corpus / "00.txt").read_text())
    config = DataConfig(source="files", path=str(corpus), validation_fraction=0.3)
    source = open_source(config, cache_dir=tmp_path / "cache")
    train, held_out = set(texts(source.train, "text")), set(texts(source.validation, "text"))
    assert not train & held_out
    assert train | held_out == {path.read_text() for path in corpus.iterdir()}
    assert len(source.train) + len(source.validation) == 41
    assert all(content_hash(text) < 0.3 * 2**64 for text in held_out)


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.5])
@pytest.mark.parametrize("count", range(1, 21))
def test_few_documents_are_split_too(tmp_path: Path, count: int, fraction: float) -> None:
    """The hash alone would leave a split of most of them empty."""
    texts_of = [f"Document {i} tells\nof the number {i}.\nIt ends here." for i in range(count)]
    for i, text in enumerate(texts_of):
        write(tmp_path / "in" / f"{i}.txt", text.encode())
    config = DataConfig(source="files", path=str(tmp_path / "in"), validation_fraction=fraction)
    source = open_source(config, cache_dir=tmp_path / "cache")
    train, held_out = list(texts(source.train, "text")), list(texts(source.validation, "text"))
    assert train and held_out
    if count == 1:
        assert ["".join(train + held_out)] == texts_of and train[0].endswith(("\n", " "))
        assert len(held_out[0]) <= max(fraction * len(texts_of[0]) + 20, 1)
        return
    assert sorted(train + held_out) == sorted(texts_of)
    hashes = sorted(content_hash(text) for text in texts_of)
    below = sum(number < fraction * 2**64 for number in hashes)
    assert sorted(map(content_hash, held_out)) == hashes[: min(max(below, 1), count - 1)]


def test_one_pair_cannot_be_split(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", b'{"text": "a question", "answer": "b"}')
    config = DataConfig(source="files", path=str(tmp_path / "x.jsonl"), target_key="answer", objective="seq2seq")
    with pytest.raises(DataError, match="split is empty; both are needed: add documents or raise"):
        open_source(config, cache_dir=tmp_path / "cache")


def test_every_format_is_read(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    folder = tmp_path / "mixed"
    folder.mkdir()
    rows = {name: [f"{name} document {i} \u00e9" for i in range(8)] for name in ("plain", "gz", "zst", "parquet")}
    lines = {name: "".join(json.dumps({"body": text}) + "\n" for text in docs).encode() for name, docs in rows.items()}
    (folder / "a.jsonl").write_bytes(lines["plain"])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines["gz"]))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(lines["zst"]))
    pq.write_table(pa.table({"body": rows["parquet"], "other": list(range(8))}), folder / "d.parquet")
    config = DataConfig(source="files", path=str(folder), text_key="body", validation_fraction=0.3)
    source = open_source(config, cache_dir=tmp_path / "cache")
    found = [*texts(source.train, "body"), *texts(source.validation, "body")]
    assert sorted(found) == sorted(text for docs in rows.values() for text in docs)


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


BAD = {
    "does not exist": lambda p: p / "none",
    "holds no file ending in": lambda p: write(p / "f" / "x.docx", b"x").parent,
    "all 1 files are empty": lambda p: write(p / "f" / "x.txt", b""),
    r"x.txt is not UTF-8 \(byte 1\); repair it or set data.on_bad_text=skip": lambda p: write(p / "x.txt", b"a\xff"),
    r"x.jsonl:2 is not JSON": lambda p: write(p / "x.jsonl", b'{"text": "a"}\n{"text": \n'),
    r"x.jsonl:1 has no field 'text'; set data.text_key .* body": lambda p: write(p / "x.jsonl", b'{"body": "a"}\n'),
    "x.parquet is not a Parquet file": lambda p: write(p / "x.parquet", b"PAR0"),
    r"x.jsonl:1: 'text' holds half a surrogate pair.*; repair it": lambda p: write(
        p / "x.jsonl", b'{"text": "a \\ud800"}\n'
    ),
    r"x.jsonl.gz cannot be unpacked \(.*\); repair it": lambda p: write(p / "x.jsonl.gz", b"not gzip"),
    r"x.jsonl.zst cannot be unpacked \(.*\); repair it": lambda p: write(p / "x.jsonl.zst", b"not zstandard"),
    "split is empty; both are needed: add documents or raise": lambda p: write(p / "x.txt", b" \n"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_data_is_named(message: str, tmp_path: Path) -> None:
    config = DataConfig(source="files", path=str(BAD[message](tmp_path / "in")), validation_fraction=0.01)
    with pytest.raises(DataError, match=message):
        open_source(config, cache_dir=tmp_path / "cache")


def test_bad_text_is_skipped_and_counted(corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(corpus / "bad.txt", b"\xff\xfe")
    config = DataConfig(source="files", path=str(corpus), on_bad_text="skip", validation_fraction=0.3)
    with caplog.at_level("WARNING", logger="jaxllm"):
        source = open_source(config, cache_dir=tmp_path / "cache")
    assert len(source.train) + len(source.validation) == 40
    assert caplog.text.count("bad.txt is not UTF-8") == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": None}, "the field 'text' of a record must be text, got None"),
        ({"text": ["a", "b"]}, "must be text, got ['a', 'b']"),
        ({"text": math.nan}, "must be text, got nan"),
        ({"body": "a"}, "records have no field 'text'; set data.text_key to one of: body"),
        ("a text", "a record must be a dict such as {'text': ...}, got 'a text'"),
    ],
)
def test_a_field_that_is_not_text_is_refused(record: Any, message: str) -> None:
    """Records of a custom source; files are checked when they are prepared."""
    with pytest.raises(DataError, match=re.escape(message)):
        field(record, "text")
    assert field({"text": b"caf\xc3\xa9"}, "text") == "café"


def test_unknown_dataset_and_blocked_cache_are_named(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no TFDS dataset 'no_such_corpus'"):
        open_source(DataConfig(source="no_such_corpus"), cache_dir=tmp_path / "cache")
    blocked = write(tmp_path / "file", b"x")
    with pytest.raises(DataError, match=r"set data.cache_dir to a writable folder"):
        open_source(DataConfig(source="files", path=str(corpus)), cache_dir=blocked / "cache")


def test_vocabularies_that_do_not_fit_are_named(corpus: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"vocab_size 300 is too small .* at least 359"):
        train_tokenizer(iter(["a"]), vocab_size=300)
    tokenizer.save(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=r"the tokenizer has 448 ids, model.vocab_size is 420"):
        open_pipeline(corpus, tmp_path / "run", tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="no tokenizer file"):
        load_tokenizer(tmp_path / "none.json")
    with pytest.raises(DataError, match=r"is not a tokenizer.json"):
        load_tokenizer(write(tmp_path / "broken.json", b"{"))


def test_sentencepiece_models_are_read_bare(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(f"the quick brown fox number {i} jumps" for i in range(300)))
    prefix = str(tmp_path / "spm")
    sentencepiece.SentencePieceTrainer.Train(
        input=str(lines), model_prefix=prefix, vocab_size=60, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        byte_fallback=False, minloglevel=2, control_symbols=["<extra_id_1>", "<extra_id_0>"],
    )  # fmt: skip
    loaded = load_tokenizer(prefix + ".model")
    again = pickle.loads(pickle.dumps(loaded))
    ids = loaded.encode("the quick fox 7")
    assert loaded.decode(ids) == again.decode(ids) == "the quick fox 7"
    assert len(loaded.sentinel_ids) == 2 and (loaded.pad_id, loaded.eos_id) == (0, 1)


BYTES = {f"<0x{i:02X}>": 2 + i for i in range(256)}


def llama_like() -> FastTokenizer:
    """As Llama 2's tokenizer.json: BPE over text with U+2581 for spaces, unknown characters as bytes."""
    pieces = ("\u2581", "a", "b", "\u2581a", "\u2581ab", "\u00e9")
    vocabulary = {"<unk>": 0, "</s>": 1, **BYTES, **{piece: 258 + i for i, piece in enumerate(pieces)}}
    merges = [("\u2581", "a"), ("\u2581a", "b")]
    fast = FastTokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    fast.decoder = decoders.Sequence(parts)
    return fast


def t5_like() -> FastTokenizer:
    """As T5's tokenizer.json: Unigram behind a Metaspace."""
    pieces = [("<unk>", -9.0), ("</s>", 0.0), *((token, -9.0) for token in BYTES)]
    pieces += [(piece, -2.0) for piece in ("\u2581", "a", "b", "\u2581a", "\u00e9")]
    fast = FastTokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return fast


@pytest.mark.parametrize("make", [llama_like, t5_like])
@pytest.mark.parametrize("text", ["ab ab", "a\n\u20ac \u00e9", "b  a"])
def test_bytes_of_a_tokenizer_json_that_spells_as_sentencepiece(make: Callable[[], FastTokenizer], text: str) -> None:
    """A space mark and <0x0A> are one byte each; the first piece includes a space that the text does not have."""
    fast = make()
    fast.add_special_tokens(["</s>"])
    fast.add_tokens(["\u2581added\u20ac"])
    tokenizer = Tokenizer(fast)
    ids = tokenizer.encode(text)
    assert tokenizer.token_bytes[ids].sum() == len(f" {text}".encode())
    assert tokenizer.token_bytes[[BYTES["<0x0A>"], tokenizer.eos_id]].tolist() == [1, 0]
    assert tokenizer.token_bytes[fast.token_to_id("\u2581added\u20ac")] == len(" added\u20ac".encode())


def test_embedded_corpus_is_this_interpreter(tmp_path: Path) -> None:
    source = open_source(DataConfig(), cache_dir=tmp_path)
    assert len(source.train) > 300 and len(source.validation) > 10
    assert sum(len(text) for text in texts(source.train, "text")) > 5_000_000
    assert any("import" in text for text in texts(source.validation, "text"))
