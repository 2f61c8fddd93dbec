"""Texts of the records of a source; imports no data library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from jaxllm.data import DataError


def texts(records: Sequence[Any], key: str) -> Iterator[str]:
    """The text of each record, in order."""
    for i in range(len(records)):
        yield field(records[i], key)


def field(record: dict[str, Any], key: str) -> str:
    """One text of a record, decoded.

    Raises:
        DataError: when the record has no such field, naming those it has.
    """
    if key not in record:
        raise DataError(f"records have no field {key!r}; set data.text_key to one of: {', '.join(sorted(record))}")
    value = record[key]
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
