"""Two TFDS builders that need no network: the interpreter's standard library, and a user's own files.

The name of a prepared dataset holds a hash of the files and of the settings that shape it, so that changed files are
prepared again. TFDS registers builders globally, so they need an importable module.
"""

import abc
import contextlib
import gzip
import hashlib
import io
import json
import os
import platform
import re
import sysconfig
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NoReturn

import tensorflow_datasets as tfds
import zstandard

from jaxllm.config import DataConfig
from jaxllm.data import DataError, first_line
from jaxllm.data.records import damaged, refused

# Folders of tests, generated tables of code points, and programs that are not the library.
_NOT_LIBRARY = set("test tests idlelib lib2to3 turtledemo site-packages __pycache__ idle_test".split())
_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_SURROGATE = re.compile("[\ud800-\udfff]")
SKIPPED = "skipped.json"  # next to the prepared documents: the problems of those that were left out
_Document = tuple[str, dict[str, str]]  # name and fields


class ProblemLog:
    """Raises at the first bad document, or lists all of them.

    Attributes:
        first: the error that was raised, which TFDS wraps.
        skipped: problems of the documents that were left out, unless the log stops.
    """

    def __init__(self, *, stop: bool) -> None:
        self.first: DataError | None = None
        self.skipped: list[str] = []
        self._stop = stop

    def report(self, message: str) -> None:
        """Reports a document that can be left out."""
        if self._stop:
            self.fail(f"{message}; repair it or set data.on_bad_text=skip")
        self.skipped.append(message)

    def fail(self, message: str) -> NoReturn:
        """Raises for a problem that leaving documents out would not solve."""
        self.first = DataError(message)
        raise self.first


@contextlib.contextmanager
def undamaged(folder: Path) -> Iterator[None]:
    """Turns errors of json, protobuf and array_record, and refusals of the system, into a DataError with the folder."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and refused(folder) is None:
            raise
        raise damaged(folder, error) from error


class LocalInfo(tfds.core.DatasetInfo):
    """Metadata of a local dataset."""

    def initialize_from_bucket(self) -> None:
        """Does nothing: TFDS's search in its bucket leaves an empty folder in the temporary one."""


class _TextBuilder(tfds.core.GeneratorBasedBuilder):
    """Documents split by a hash of their content, so that equal documents are in the same split.

    Where a split would be empty, it gets the document of the smallest or largest hash, or the end of the only one.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self, cache_dir: Path, config: DataConfig, problems: ProblemLog, *, files: list[Path], prefix: str, content: str
    ) -> None:
        self._data, self._problems, self._files = config, problems, files
        self._keys = ["text"] if config.source == "stdlib" else [config.text_key]
        if config.target_key is not None:
            self._keys.append(config.target_key)
        self._fraction = 0.0 if config.validation else config.validation_fraction
        digest = hashlib.sha256(f"{content}/{self._fraction}".encode()).hexdigest()
        label = f"{prefix}-{digest[:10]}"
        builder_config = tfds.core.BuilderConfig(name=label, version="1.0.0")
        with undamaged(cache_dir / self.name / label):
            super().__init__(data_dir=str(cache_dir), config=builder_config)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"name": tfds.features.Text(), **{key: tfds.features.Text() for key in self._keys}}
        return LocalInfo(builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        limit = self._limit() if self._fraction else 0.0
        splits = {"train": False, "validation": True} if self._fraction else {"train": False}
        return {name: self._generate_examples(limit, held_out=held_out) for name, held_out in splits.items()}

    def _limit(self) -> float | None:
        """The hash below which a document is held out; None for a single document, whose end is held out."""
        limit, lowest, highest = self._fraction * 2**64, 2**64, -1
        before = list(self._problems.skipped)
        for _, fields in self._documents():
            number = content_hash(*fields.values())
            lowest, highest = min(lowest, number), max(highest, number)
            if lowest < limit <= highest:
                break
        self._problems.skipped = before
        if lowest == highest and len(self._keys) == 1:
            return None
        return min(max(limit, lowest + 1), highest)

    def _generate_examples(self, limit: float | None, *, held_out: bool) -> Iterator[tuple[int, dict[str, str]]]:
        # This runs once for each split; only the first pass over the files keeps the problems.
        before = list(self._problems.skipped)
        for index, (name, fields) in enumerate(self._documents()):
            if limit is None:
                ((key, text),) = fields.items()
                if part := cut_end(text, self._fraction)[held_out]:  # of one character, the beginning is empty
                    yield index, {"name": name, key: part}
            elif (content_hash(*fields.values()) < limit) == held_out:
                yield index, {"name": name, **fields}
        if held_out:
            self._problems.skipped = before
        elif self._problems.skipped:
            (Path(self.data_dir) / SKIPPED).write_text(json.dumps(self._problems.skipped))

    @abc.abstractmethod
    def _documents(self) -> Iterator[_Document]:
        """Name and fields of each document."""

    def _decode(self, data: bytes, where: str) -> str | None:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            self._problems.report(f"{where} is not UTF-8 (byte {error.start})")
            return None


class StdlibText(_TextBuilder):
    """Source of the running interpreter's standard library, one document per file."""

    @classmethod
    def for_interpreter(cls, cache_dir: Path, config: DataConfig, problems: ProblemLog) -> "StdlibText":
        """The builder of this interpreter; its name holds the version and a hash of the content."""
        root = Path(sysconfig.get_path("stdlib"))
        modules = (path for path in root.rglob("*.py") if not _NOT_LIBRARY.intersection(path.relative_to(root).parts))
        files = sorted(path for path in modules if path.is_file())
        if not files:
            raise DataError(
                f"this Python has no library source in {root} (some distributions ship it compiled or zipped); "
                f"use data.source=files with data.path, or another Python"
            )
        digest = hashlib.sha256()
        for path in files:
            digest.update(path.read_bytes())
        prefix = f"python{platform.python_version()}"
        return cls(cache_dir, config, problems, files=files, prefix=prefix, content=digest.hexdigest())

    def _documents(self) -> Iterator[_Document]:
        root = sysconfig.get_path("stdlib")
        for path in self._files:
            if text := self._decode(path.read_bytes(), str(path)):
                yield path.relative_to(root).as_posix(), {"text": text}


class FilesText(_TextBuilder):
    """Documents of a file or folder: each .txt, each line of .jsonl, each row of .parquet.

    Damage that leaves text valid is found by a checksum. A .gz has one at its end; with on_bad_text=skip the documents
    before it are kept. In .zst and .parquet the checksum is optional.
    """

    @classmethod
    def for_path(cls, cache_dir: Path, config: DataConfig, problems: ProblemLog, key: str = "data.path") -> "FilesText":
        """The builder of `config.path`, which is the setting `key`; its name holds a hash of names, sizes and times."""
        root = Path(config.path or "").expanduser()
        if not root.exists():
            raise DataError(f"{key} {root} does not exist")
        files = [path for path in files_below(root) if path.name.endswith(_SUFFIXES)]
        if not files:
            raise DataError(f"{key} {root} holds no file ending in {', '.join(_SUFFIXES)}")
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        if not any(size for _, size, _ in stats):
            raise DataError(f"{key} {root}: all {len(files)} files are empty")
        keys = f"{config.text_key}/{config.target_key}/{config.on_bad_text}"
        return cls(cache_dir, config, problems, files=files, prefix="files", content=repr((stats, keys)))

    def _documents(self) -> Iterator[_Document]:
        readers = {".txt": self._whole, ".parquet": self._rows}
        for path in self._files:
            try:
                yield from readers.get(path.suffix, self._lines)(path)
            except OSError as error:
                self._problems.fail(f"{path} cannot be read: {error.strerror or error}; make it readable")
            except MemoryError:
                self._problems.fail(f"{path} holds a document too large for this machine's memory; split it")

    def _whole(self, path: Path) -> Iterator[_Document]:
        text = self._decode(path.read_bytes(), str(path))
        if text and text.strip():
            yield str(path), {self._keys[0]: text}

    def _lines(self, path: Path) -> Iterator[_Document]:
        for number, line in enumerate(self._unpacked(path), start=1):
            where = f"{path}:{number}"
            text = self._decode(line, where)
            if text is None or not text.strip():
                continue
            try:
                record = json.loads(text)
            except json.JSONDecodeError as error:
                self._problems.report(f"{where} is not JSON ({error.msg})")
                continue
            yield from self._record(record, where)

    def _unpacked(self, path: Path) -> Iterator[bytes]:
        try:
            yield from _open_lines(path)
        except (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError) as error:
            self._problems.report(f"{path} cannot be unpacked ({error})")

    def _rows(self, path: Path) -> Iterator[_Document]:
        import pyarrow.parquet as pq

        path.open("rb").close()  # a refusal of the system is not damage
        try:
            table = pq.ParquetFile(path, page_checksum_verification=True)
        except Exception as error:
            self._problems.report(f"{path} is not a Parquet file ({first_line(error)})")
            return
        self._require_keys(table.schema_arrow.names, str(path))
        for number, row in self._numbered(table, path):
            yield from self._record(row, f"{path}:{number}")

    def _numbered(self, table: Any, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        number = 0
        try:
            for batch in table.iter_batches(batch_size=1024, columns=self._keys):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
        except MemoryError:
            raise
        except Exception as error:  # of pyarrow, for a damaged page
            self._problems.report(f"{path} cannot be read after row {number} ({first_line(error)})")

    def _record(self, record: Any, where: str) -> Iterator[_Document]:
        if not isinstance(record, dict):
            self._problems.report(f"{where} holds a {type(record).__name__}, not an object")
            return
        self._require_keys(record, where)
        fields = {key: record[key] for key in self._keys}
        if problem := _problem(fields):
            self._problems.report(f"{where}: {problem}")
        elif all(value.strip() for value in fields.values()):
            yield where, fields

    def _require_keys(self, known: Collection[str], where: str) -> None:
        for key in self._keys:
            if key not in known:
                names = ", ".join(sorted(known))
                self._problems.fail(
                    f"{where} has no field {key!r}; set data.text_key (or target_key) to one of: {names}"
                )


def _problem(fields: dict[str, Any]) -> str | None:
    for key, value in fields.items():
        if not isinstance(value, str):
            return f"{key!r} is a {type(value).__name__}, not text"
        if _SURROGATE.search(value):
            return f"{key!r} holds half a surrogate pair, which is not UTF-8 text"
    empty = [key for key, value in fields.items() if not value.strip()]
    return f"{empty[0]!r} of the pair is empty" if 0 < len(empty) < len(fields) else None


def files_below(root: Path) -> list[Path]:
    """A file, or those of a folder and of all below it, sorted; a folder that cannot be listed is a DataError."""

    def refuse(error: OSError) -> NoReturn:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}; make it readable")

    if root.is_file():
        return [root]
    found = (Path(folder) / name for folder, _, names in os.walk(root, onerror=refuse) for name in names)
    return sorted(path for path in found if path.is_file())


def content_hash(*fields: str) -> int:
    """64 bits of a document, by its content alone."""
    digest = hashlib.sha256("\0".join(fields).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def cut_end(text: str, fraction: float) -> tuple[str, str]:
    """A text without its end, and its end of about a `fraction` of the characters; a line, or a word, stays whole."""
    at = min(round(len(text) * (1 - fraction)), len(text) - 1)
    near = at - max(at // 10, min(at // 2, 100))
    at = next((found + 1 for mark in "\n " if (found := text.rfind(mark, near, at)) >= 0), at)
    return text[:at], text[at:]


def _open_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        if path.suffix == ".gz":
            yield from gzip.open(file)
        elif path.suffix == ".zst":
            yield from io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file))
        else:
            yield from file
