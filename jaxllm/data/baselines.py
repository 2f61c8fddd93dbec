"""Baselines of a model: bits per byte of the same text under two models that need no training."""

import lzma

import numpy as np

from jaxllm.data.records import is_stream, sample_texts
from jaxllm.data.sources import Source
from jaxllm.data.tokenizer import Tokenizer


def simple_baselines(source: Source, tokenizer: Tokenizer, key: str) -> dict[str, float]:
    """Bits per byte of the field `key` of the validation records, estimated from samples of the corpus.

    A stream has no sample, so that its unigram counts are those of the validation records.

    unigram: each token at its add-one frequency in the training text. lzma: each document compressed alone by xz at its
    strongest preset.
    """
    counts = np.ones(tokenizer.vocab_size)
    counted = source.validation if is_stream(source.train) else source.documents("the unigram")
    for text in sample_texts(counted, key):
        counts += np.bincount(tokenizer.encode(text), minlength=len(counts))
    surprise = -np.log2(counts / counts.sum())
    bits = size = packed = 0.0
    for text in sample_texts(source.validation, key):
        data = text.encode()
        bits += float(surprise[tokenizer.encode(text)].sum())
        packed += 8 * _xz_bytes(data)
        size += len(data)
    return {"unigram": bits / max(size, 1), "lzma": packed / max(size, 1)}


def _xz_bytes(data: bytes) -> int:
    # A dictionary longer than the document would only cost memory.
    preset = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": max(len(data), 4096)}
    return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=[preset]))
