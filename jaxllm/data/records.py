"""Records of a source, by number or as a stream, and their texts; imports no data library."""

import bisect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import numpy as np

from jaxllm.data import DataError, first_line


class Records(Sequence[Any]):
    """Records of a split by number; one that cannot be read is an error that names its file and the fix."""

    def __init__(self, source: Sequence[Any], files: Sequence[tuple[str, int]]) -> None:
        """`source` reads them; `files` are their paths in order, each with its number of records."""
        self._source = source
        self._files = [path for path, _ in files]
        self._ends = list(itertools.accumulate(count for _, count in files))

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        """One record; DataError when it is damaged or its file cannot be read, IndexError beyond the last."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        try:
            return self._source[index % len(self)]
        except Exception as error:  # array_record and protobuf raise their own
            path = Path(self.file_of(index))
            raise damaged(path.parent, error, f"{path.name}: ") from error

    def file_of(self, index: int) -> str:
        """The file that holds a record."""
        return self._files[bisect.bisect_right(self._ends, index % len(self))]


class Stream(Protocol):
    """Records without end, such as a download, a mixture or a generator of synthetic text.

    A position is a JSON-able value. A stream that ends, by StopIteration, ends the run with an error.
    """

    def __next__(self) -> dict[str, Any]: ...

    def get_state(self) -> Any:
        """The position after the last record."""

    def set_state(self, state: Any) -> None:
        """Goes to a position of `get_state`."""


def is_stream(records: Any) -> TypeGuard[Stream]:
    """Whether records have a position instead of numbers."""
    return hasattr(records, "get_state")


def file_of(records: Sequence[Any], number: int) -> str:
    """The file of a record, or its number where the records are not in files."""
    return records.file_of(number) if isinstance(records, Records) else f"record {number}"


def damaged(folder: Path, error: Exception, where: str = "") -> DataError:
    """The error for prepared data that cannot be read: damage, or a refusal of the system."""
    refusal = refused(folder) or (error if isinstance(error, OSError) else None)
    if refusal is not None:
        reason = refusal.strerror or refusal
        return DataError(f"{refusal.filename or folder} cannot be read: {reason}; make it readable")
    words = f"{where}{first_line(error)}"
    return DataError(f"data prepared in {folder} is damaged ({words}); remove that folder, to prepare it again")


def refused(folder: Path) -> OSError | None:
    """The error of the system when it opens the files of a folder, or None; libraries call a refusal damage."""
    try:
        for path in folder.rglob("*"):
            if path.is_file():
                path.open("rb").close()
    except OSError as error:
        return error
    return None


# A unigram on this much is within one percent of one on 5 MB, and reading it takes little time.
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
    """One text of a record, decoded; DataError when it has no such field, or no text there."""
    if not isinstance(record, Mapping):
        raise DataError(f"a record must be a dict such as {{{key!r}: ...}}, got {record!r:.60}")
    if key not in record:
        raise DataError(f"records have no field {key!r}; set data.text_key to one of: {', '.join(sorted(record))}")
    value = record[key]
    value = value.decode("utf-8") if isinstance(value, bytes) else value
    if not isinstance(value, str):
        raise DataError(f"the field {key!r} of a record must be text, got {value!r:.60}")
    return value
