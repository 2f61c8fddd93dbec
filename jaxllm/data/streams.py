"""Documents from an iterator of the caller, with the position that a checkpoint needs."""

import copy
from collections.abc import Callable
from typing import Any, Protocol, TypeGuard

import grain

from jaxllm.data import DataError, first_line
from jaxllm.data.packing import Batch


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


class _Iterator(grain.DatasetIterator[Batch]):
    def __init__(self, stream: Stream, encode: Callable[[dict[str, Any]], Batch]) -> None:
        super().__init__()
        self._stream, self._encode = stream, encode

    def __next__(self) -> Batch:
        try:
            return self._encode(next(self._stream))
        except (StopIteration, DataError):
            raise
        except Exception as error:  # of the caller's code, such as a download
            raise DataError(f"the stream of documents failed: {first_line(error)}") from error

    def get_state(self) -> dict[str, Any]:
        return {"stream": copy.deepcopy(self._stream.get_state())}  # the stream may change it as it reads on

    def set_state(self, state: dict[str, Any]) -> None:
        self._stream.set_state(state["stream"])


class EncodedStream(grain.IterDataset[Batch]):
    """The records of a stream, encoded in their order."""

    def __init__(self, stream: Stream, encode: Callable[[dict[str, Any]], Batch]) -> None:
        super().__init__()
        self._stream, self._encode = stream, encode

    def __iter__(self) -> _Iterator:
        return _Iterator(self._stream, self._encode)
