"""SentencePiece models, like tokenizer.json: files round-trip, and any ids that a model writes become text."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxllm.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from tests.conftest import full_disk

TEXTS = [f"the quick brown fox number {i} jumps" for i in range(300)]


@pytest.fixture(params=["tokenizer.json", "tokenizer.model"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / request.param
    if path.suffix == ".json":
        train_tokenizer(TEXTS, vocab_size=370).save(path)
        return path
    sentencepiece = pytest.importorskip("sentencepiece")
    special = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=60, minloglevel=2, **special
        )
    return path


@pytest.fixture
def tokenizer(path: Path) -> Tokenizer:
    return load_tokenizer(path)


def test_ids_beyond_the_vocabulary_say_nothing(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the quick fox").tolist()
    beyond = [tokenizer.vocab_size, 10**6]
    assert tokenizer.decode([*ids[:4], *beyond, *ids[4:]]) == tokenizer.decode(ids) == "the quick fox"
    assert tokenizer.decode(beyond) == ""


def test_a_save_that_fails_leaves_the_file_as_it_was(path: Path, tokenizer: Tokenizer) -> None:
    before = path.read_bytes()
    with full_disk(100), pytest.raises(OSError, match="File too large"):
        tokenizer.save(path)
    assert path.read_bytes() == before
    tokenizer.save(path)
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert load_tokenizer(path).fingerprint == tokenizer.fingerprint
