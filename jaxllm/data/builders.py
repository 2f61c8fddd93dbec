"""Two TFDS builders that need no network: the interpreter's standard library, and a user's own files.

What a prepared dataset holds is in its name: a hash of the files and of the settings that shaped it, so that changed
files are prepared again. TFDS registers builders globally, hence an importable module.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import platform
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import tensorflow_datasets as tfds

from jaxllm.config import DataConfig
from jaxllm.data import DataError, first_line
from jaxllm.data.records import damaged, refused

# Tests, generated tables of code points, and what ships next to the library proper.
_NOT_LIBRARY = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "site-packages",
    "__pycache__",
    "idle_test",
}
_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
SKIPPED = "skipped.json"  # beside the prepared documents: what is wrong with those that were left out
_Document = tuple[str, dict[str, str]]  # name and fields


class ProblemLog:
    """Decides what a bad document does, and keeps the error that TFDS would wrap."""

    def __init__(self, *, stop: bool) -> None:
        """`stop` raises at the first one; otherwise they are listed in `skipped`."""
        self.first: DataError | None = None
        self.skipped: list[str] = []
        self._stop = stop

    def report(self, message: str) -> None:
        """A document that can be left out."""
        if self._stop:
            self.fail(f"{message}; repair it or set data.on_bad_text=skip")
        self.skipped.append(message)

    def fail(self, message: str) -> None:
        """A problem that nothing can be done about here."""
        self.first = DataError(message)
        raise self.first


@contextlib.contextmanager
def undamaged(folder: Path) -> Iterator[None]:
    """Names the folder of prepared data that can't be read: TFDS passes on errors of json, protobuf and array_record.

    Raises:
        DataError: in place of those, and for a file that may not be read.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and refused(folder) is None:
            raise
        raise damaged(folder, error) from error


class LocalInfo(tfds.core.DatasetInfo):
    """What is known of a dataset that no bucket holds."""

    def initialize_from_bucket(self) -> None:
        """Nothing: TFDS makes a folder in the system's temporary one for what it finds, and leaves it there empty."""


class _TextBuilder(tfds.core.GeneratorBasedBuilder):
    """Documents split by a hash of their content, so that equal documents fall on one side."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, cache_dir: Path, label: str, config: DataConfig, problems: ProblemLog) -> None:
        self._data, self._problems = config, problems
        self._keys = ["text"] if config.source == "stdlib" else [config.text_key]
        if config.target_key is not None:
            self._keys.append(config.target_key)
        builder_config = tfds.core.BuilderConfig(name=label, version="1.0.0")
        with undamaged(cache_dir / self.name / label):
            super().__init__(data_dir=str(cache_dir), config=builder_config)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"name": tfds.features.Text(), **{key: tfds.features.Text() for key in self._keys}}
        return LocalInfo(builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {
            "train": self._generate_examples(held_out=False),
            "validation": self._generate_examples(held_out=True),
        }

    def _generate_examples(self, *, held_out: bool) -> Iterator[tuple[int, dict[str, str]]]:
        # Twice over the files, once for each split: a bad one is reported in the first pass only.
        before = list(self._problems.skipped)
        for index, (name, fields) in enumerate(self._documents()):
            if is_held_out("\0".join(fields.values()), self._data.validation_fraction) == held_out:
                yield index, {"name": name, **fields}
        if held_out:
            self._problems.skipped = before
        elif self._problems.skipped:
            (Path(self.data_dir) / SKIPPED).write_text(json.dumps(self._problems.skipped))

    def _documents(self) -> Iterator[_Document]:
        raise TypeError(f"{type(self).__name__} must say what its documents are")


class StdlibText(_TextBuilder):
    """Source of the running interpreter's standard library, one document per file."""

    @classmethod
    def for_interpreter(cls, cache_dir: Path, config: DataConfig, problems: ProblemLog) -> StdlibText:
        """The builder of this interpreter; its name holds the version and a hash of the content."""
        root = Path(sysconfig.get_path("stdlib"))
        files = stdlib_files(root)
        if not files:
            raise DataError(
                f"this Python has no library source in {root} (some distributions ship it compiled or zipped); "
                f"use data.source=files with data.path, or another Python"
            )
        digest = hashlib.sha256()
        for path in files:
            digest.update(path.read_bytes())
        label = f"python{platform.python_version()}-{_label(digest.hexdigest(), config)}"
        builder = cls(cache_dir=cache_dir, label=label, config=config, problems=problems)
        builder._files, builder._root = files, root
        return builder

    _files: list[Path]
    _root: Path

    def _documents(self) -> Iterator[_Document]:
        for path in self._files:
            text = decode(path.read_bytes(), str(path), self._problems)
            if text:
                yield path.relative_to(self._root).as_posix(), {"text": text}


class FilesText(_TextBuilder):
    """Documents of a file or folder: a .txt is one, a line of .jsonl or a row of .parquet is one.

    Damage that leaves text valid is found where the format has a checksum: always in .gz, at its end (with
    on_bad_text=skip the documents before it are kept); in .zst and .parquet if the writer put one there.
    """

    @classmethod
    def for_path(cls, cache_dir: Path, config: DataConfig, problems: ProblemLog) -> FilesText:
        """The builder of `config.path`; its name holds a hash of names, sizes and times."""
        root = Path(config.path or "").expanduser()
        if not root.exists():
            raise DataError(f"data.path {root} does not exist")
        files = [path for path in files_below(root) if path.name.endswith(_SUFFIXES)]
        if not files:
            raise DataError(f"data.path {root} holds no file ending in {', '.join(_SUFFIXES)}")
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        if not any(size for _, size, _ in stats):
            raise DataError(f"data.path {root}: all {len(files)} files are empty")
        keys = f"{config.text_key}/{config.target_key}/{config.on_bad_text}"
        label = f"files-{_label(repr((stats, keys)), config)}"
        builder = cls(cache_dir=cache_dir, label=label, config=config, problems=problems)
        builder._files = files
        return builder

    _files: list[Path]

    def _documents(self) -> Iterator[_Document]:
        for path in self._files:
            reader = self._rows if path.name.endswith(".parquet") else self._lines
            if path.suffix == ".txt":
                reader = self._whole
            try:
                yield from reader(path)
            except OSError as error:
                self._problems.fail(f"{path} cannot be read: {error.strerror or error}; make it readable")
            except MemoryError:
                self._problems.fail(f"{path} holds a document too large for this machine's memory; split it")

    def _whole(self, path: Path) -> Iterator[_Document]:
        text = decode(path.read_bytes(), str(path), self._problems)
        if text and text.strip():
            yield str(path), {self._keys[0]: text}

    def _lines(self, path: Path) -> Iterator[_Document]:
        for number, line in enumerate(self._unpacked(path), start=1):
            where = f"{path}:{number}"
            text = decode(line, where, self._problems)
            if text is None or not text.strip():
                continue
            try:
                record = json.loads(text)
            except json.JSONDecodeError as error:
                self._problems.report(f"{where} is not JSON ({error.msg})")
                continue
            yield from self._record(record, where)

    def _unpacked(self, path: Path) -> Iterator[bytes]:
        import zstandard

        try:
            yield from _open_lines(path)
        except (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError) as error:
            self._problems.report(f"{path} cannot be unpacked ({error})")

    def _rows(self, path: Path) -> Iterator[_Document]:
        import pyarrow.parquet as pq

        path.open("rb").close()  # what the system refuses is not damaged
        try:
            table = pq.ParquetFile(path, page_checksum_verification=True)
        except Exception as error:
            self._problems.report(f"{path} is not a Parquet file ({first_line(error)})")
            return
        missing = [key for key in self._keys if key not in table.schema_arrow.names]
        if missing:
            self._problems.fail(_missing_key(missing[0], str(path), table.schema_arrow.names))
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
        for key in self._keys:
            if key not in record:
                self._problems.fail(_missing_key(key, where, list(record)))
        fields = {key: record[key] for key in self._keys}
        wrong = [key for key, value in fields.items() if not isinstance(value, str)]
        if wrong:
            self._problems.report(f"{where}: {wrong[0]!r} is a {type(fields[wrong[0]]).__name__}, not text")
            return
        halves = [key for key, value in fields.items() if not _encodes(value)]
        if halves:
            self._problems.report(f"{where}: {halves[0]!r} holds half a surrogate pair, which is not UTF-8 text")
            return
        empty = [key for key, value in fields.items() if not value.strip()]
        if not empty:
            yield where, fields
        elif len(empty) < len(fields):
            self._problems.report(f"{where}: {empty[0]!r} of the pair is empty")


def files_below(root: Path) -> list[Path]:
    """A file, or those of a folder and of all below it, sorted.

    Raises:
        DataError: for a folder that cannot be listed, whose documents would be missing silently.
    """

    def refuse(error: OSError) -> NoReturn:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}; make it readable")

    if root.is_file():
        return [root]
    found = (Path(folder) / name for folder, _, names in os.walk(root, onerror=refuse) for name in names)
    return sorted(path for path in found if path.is_file())


def stdlib_files(root: Path) -> list[Path]:
    """The library's modules below `root`, sorted, without tests and demonstrations."""
    found = (path for path in root.rglob("*.py") if not _NOT_LIBRARY.intersection(path.relative_to(root).parts))
    return sorted(path for path in found if path.is_file())


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to validation: a pure function of its content."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def decode(data: bytes, where: str, problems: ProblemLog) -> str | None:
    """UTF-8 text, or None when it is not and the problem log lets it pass."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        problems.report(f"{where} is not UTF-8 (byte {error.start})")
        return None


def _label(content: str, config: DataConfig) -> str:
    shaped = f"{content}/{config.validation_fraction}"
    return hashlib.sha256(shaped.encode()).hexdigest()[:10]


def _missing_key(key: str, where: str, known: list[str]) -> str:
    return f"{where} has no field {key!r}; set data.text_key (or target_key) to one of: {', '.join(sorted(known))}"


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _open_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        if path.suffix == ".gz":
            yield from gzip.open(file)
        elif path.suffix == ".zst":
            import zstandard

            yield from io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file))
        else:
            yield from file
