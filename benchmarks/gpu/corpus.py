"""Writes the corpus and the tokenizer of the runs of a minute: python -m benchmarks.gpu.corpus FOLDER.

The documents are the source of this interpreter's standard library.
"""

import gzip
import json
import sys
import tempfile
from pathlib import Path

from jaxllm.config import DataConfig
from jaxllm.data.records import texts
from jaxllm.data.sources import open_source
from jaxllm.data.tokenizer import train_tokenizer

CORPUS, TOKENIZER, VOCABULARY = "corpus.jsonl.gz", "tokenizer.json", 8192


def main(folder: Path) -> None:
    """Writes both files, the held-out documents included: another split is made of them there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as prepared:
        source = open_source(DataConfig(), cache_dir=Path(prepared))
        documents = [*texts(source.documents("a corpus"), "text"), *texts(source.validation, "text")]
    with gzip.open(folder / CORPUS, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    train_tokenizer(documents, vocab_size=VOCABULARY).save(folder / TOKENIZER)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
