"""Texts of the records of a source; imports no data library."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxllm.data import DataError

# A unigram on this much is within one percent of one on 5 MB, and reading it does not hold up a start.
_SAMPLE_DOCUMENTS, _SAMPLE_CHARACTERS = 400, 2**20


def texts(records: Sequence[Any], key: str) -> Iterator[str]:
    """The text of each record, in order."""
    for i in range(len(records)):
        yield field(records[i], key)


def sample_texts(records: Sequence[Any], key: str) -> Iterator[str]:
    """Texts from the whole corpus in a fixed random order, until there is enough for statistics."""
    stride = max(math.ceil(len(records) / _SAMPLE_DOCUMENTS), 1)
    characters = 0
    for i in np.random.default_rng(0).permutation(np.arange(0, len(records), stride)):
        yield (text := field(records[int(i)], key))
        characters += len(text)
        if characters >= _SAMPLE_CHARACTERS:
            return


def field(record: dict[str, Any], key: str) -> str:
    """One text of a record, decoded.

    Raises:
        DataError: when the record has no such field, naming those it has.
    """
    if key not in record:
        raise DataError(f"records have no field {key!r}; set data.text_key to one of: {', '.join(sorted(record))}")
    value = record[key]
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
