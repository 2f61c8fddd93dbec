"""Where documents come from: the embedded corpus, the user's files, or any TFDS name, all through one path.

TFDS prepares each as ArrayRecord once and reads it as a random-access data source, which needs no TensorFlow. The
builders for the embedded corpus and for files are in `jaxllm.data.builders`.
"""

import contextlib
import dataclasses
import errno
import importlib
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import tensorflow_datasets as tfds

from jaxllm.config import DataConfig
from jaxllm.data import DataError, first_line
from jaxllm.data.builders import SKIPPED, FilesText, ProblemLog, StdlibText, undamaged
from jaxllm.data.durable import sync_tree
from jaxllm.data.records import Records, Stream, is_stream

_log = logging.getLogger(__name__)

# A full disk in the words of the system and of TFDS; array_record passes on only the text.
_NO_SPACE = (*map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)), "Not enough disk space")

_TOO_FEW = "the training or validation split is empty; both are needed: add documents or raise data.validation_fraction"


class Source(NamedTuple):
    """Documents of a corpus."""

    name: str  # corpus and version, for logs and checkpoints
    # Random access to dicts of text or UTF-8 bytes; or a stream of them without end, which is read in its own order.
    train: Sequence[dict[str, Any]] | Stream
    validation: Sequence[dict[str, Any]]  # the held-out records, or those of the first of `sets`
    sets: Mapping[str, "Source"] = MappingProxyType({})  # of data.validation; all records of each are its `train`

    def documents(self, purpose: str) -> Sequence[dict[str, Any]]:
        """The training records by number; DataError for a stream, naming the purpose that needs them."""
        if is_stream(self.train):
            raise DataError(f"{purpose} needs documents by number, and the source {self.name} is a stream without end")
        return cast(Sequence[dict[str, Any]], self.train)


def open_sets(config: DataConfig, *, cache_dir: Path) -> dict[str, Source]:
    """The sets of `data.validation`, prepared as data.path is; DataError as `open_source`, naming the set."""
    sets = {}
    for name, path in config.validation.items():
        described = dataclasses.replace(config, source="files", path=path)
        sets[name] = open_source(described, cache_dir=cache_dir, key=f"data.validation.{name}")
    return sets


def open_source(config: DataConfig, *, cache_dir: Path, key: str = "data.path") -> Source:
    """Opens the corpus of a config, prepared if need be; with `data.validation` nothing of it is held out.

    Raises:
        DataError: when it is missing, empty or unreadable, or needs a network; `key` names the setting of its path.
    """
    problems = ProblemLog(stop=config.on_bad_text == "stop")
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _quiet():
            if config.source == "stdlib":
                builder = StdlibText.for_interpreter(cache_dir, config, problems)
            elif config.source == "files":
                builder = FilesText.for_path(cache_dir, config, problems, key)
            else:
                builder = _tfds_builder(config.source, cache_dir)
        lack = f"{key} {config.path} has no documents" if config.validation else _TOO_FEW
        _prepare(builder, problems, lack)
    except OSError as error:
        raise DataError(
            f"cannot prepare {config.source} in {cache_dir}: {error.strerror or error}; set data.cache_dir to a "
            f"writable folder with free space"
        ) from error
    skipped = Path(builder.data_dir) / SKIPPED
    with undamaged(skipped.parent):
        messages = json.loads(skipped.read_text()) if skipped.is_file() else ()
    for message in messages:
        _log.warning("skipped %s", message)
    # A reader that is made from the folder alone can be sent to worker processes.
    with undamaged(skipped.parent):
        train, validation = _splits(tfds.builder_from_directory(builder.data_dir), config)
    return Source(builder.info.full_name, train, validation)


def _tfds_builder(name: str, cache_dir: Path) -> Any:
    try:
        importlib.import_module("tensorflow_datasets.text")  # registers lazily loaded ones, such as c4
        return tfds.builder(name, data_dir=str(cache_dir))
    except Exception as error:
        raise DataError(
            f"no TFDS dataset {name!r} ({first_line(error)}); use stdlib, files, or a name from the TFDS catalogue"
        ) from error


def _prepare(builder: Any, problems: ProblemLog, lack: str) -> None:
    prepared = builder.data_path.exists()
    if not prepared:
        _log.info("preparing %s in %s", builder.info.full_name, builder.data_path)
    try:
        with _quiet():
            builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        if builder.data_path.exists():
            return  # another run has prepared the same; folders are renamed into place when they are whole
        if problems.first is not None:
            raise problems.first from error
        if isinstance(error, OSError) and error.errno is not None:
            raise
        name = builder.info.full_name
        if isinstance(error, MemoryError):
            raise DataError(
                f"{name} needs more memory to be prepared than this machine has free; end other programs, or split its "
                f"largest documents"
            ) from error
        no_space = next((words for words in _NO_SPACE if words in first_line(error)), None)
        if no_space is not None:
            raise OSError(errno.ENOSPC, no_space) from error
        if "No examples were yielded" in str(error):
            raise DataError(f"{name}: {lack}") from error
        raise DataError(
            f"{name} could not be prepared without TensorFlow ({first_line(error)}); it may need a network or Apache "
            f"Beam. Or prepare it elsewhere as array_record and put it into data.cache_dir"
        ) from error
    if not prepared:
        sync_tree(Path(builder.data_dir))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS's prints, bars and advice about downloads out of a run's log."""
    tfds.disable_progress_bar()
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _splits(builder: Any, config: DataConfig) -> tuple[Sequence[Any], Sequence[Any]]:
    known, held_out = builder.info.splits, not config.validation
    expected = ["train", "validation"] if held_out else ["train"]
    if config.source in ("stdlib", "files") and sorted(known) != expected:
        raise ValueError(f"dataset_info.json has the splits {', '.join(known)}, not {' and '.join(expected)}")
    percent = max(round(100 * config.validation_fraction), 1)
    other = next((name for name in ("validation", "test") if name in known), None)
    names = ["train", other] if other else [f"train[{percent}%:]", f"train[:{percent}%]"]
    names = names if held_out else ["train"]
    for name in {name.partition("[")[0] for name in names}:
        _check_lengths(known[name])
    splits = [_records(builder, name) for name in names]
    train, validation = splits[0], splits[1] if held_out else ()
    if not len(train) or (held_out and not len(validation)):
        raise DataError(f"{builder.info.full_name}: {_TOO_FEW}")
    for records in splits:
        _ = records[0]  # raises now where records cannot be read
    return train, validation


def _records(builder: Any, split: str) -> Records:
    files = [(str(each.filename), each.take) for each in builder.info.splits[split].file_instructions]
    return Records(builder.as_data_source(split=split), files)


def _check_lengths(split: Any) -> None:
    """Compares dataset_info.json with the files, whose last documents would not be read if it had fewer."""
    from array_record.python.array_record_module import ArrayRecordReader

    for path, count in zip(split.filepaths, split.shard_lengths, strict=True):
        reader = ArrayRecordReader(str(path))
        found = reader.num_records()
        reader.close()
        if found != count:
            raise ValueError(f"{path.name} holds {found} documents, dataset_info.json has {count}")
