"""The tokenizer of a run: which one its folder keeps, and when another may take its place.

A run that has made a step never gets another tokenizer, since its parameters belong to these ids. Before that its
folder follows the config, except that a tokenizer which a person put there is not replaced.
"""

from __future__ import annotations

import enum
import itertools
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.config import DataConfig
from jaxllm.data import DataError
from jaxllm.data.records import texts
from jaxllm.data.sources import Source
from jaxllm.data.tokenizer import Tokenizer, load_tokenizer, tokenizers_in, train_tokenizer
from jaxllm.run.folder import TOKENIZER, TOKENIZER_ORIGIN, has_begun

_log = logging.getLogger(__name__)

# What determines a tokenizer: the fingerprint of a given file, or the corpus and size that one is trained for.
Origin = dict[str, Any]


class Kept(NamedTuple):
    """The tokenizer that a run folder holds.

    Attributes:
        origin: its origin, with the keys of the wanted one; None where no file records it.
        by_run: whether a run made it; otherwise a person put it there.
    """

    origin: Origin | None
    by_run: bool


class Choice(enum.Enum):
    """What to do with the tokenizer of a run folder."""

    KEEP = enum.auto()
    MAKE = enum.auto()


class Refuse(NamedTuple):
    """Neither is right.

    Attributes:
        reason: predicate of an error message about the tokenizer, or about the folder where it holds none.
    """

    reason: str


def decide(kept: Kept | None, wanted: Origin | None, *, begun: bool) -> Choice | Refuse:
    """Keeps the tokenizer of a folder, makes the one that the config describes, or refuses the config.

    | kept                            | wanted                     | begun | decision                          |
    |---------------------------------|----------------------------|-------|-----------------------------------|
    | none                            | any                        | no    | make                              |
    | none                            | any                        | yes   | refuse: the ids are lost          |
    | any                             | its file is missing (None) | no    | make, which names the file        |
    | any                             | its file is missing (None) | yes   | keep: the run or the file moved   |
    | of the same origin              | any                        | any   | keep                              |
    | of no recorded origin           | trained                    | any   | keep                              |
    | of another origin, by a person  | any                        | any   | refuse                            |
    | of another origin, by a run     | any                        | no    | make, which replaces it           |
    | of another origin, by a run     | any                        | yes   | refuse                            |

    Args:
        kept: the tokenizer of the folder, None where it holds none.
        wanted: the origin that the config describes, None where the file that it names is missing.
        begun: whether the run has made a step.
    """
    if kept is None:
        return Refuse("holds a run whose tokenizer is not there any more") if begun else Choice.MAKE
    if wanted is None:
        return Choice.KEEP if begun else Choice.MAKE
    before = wanted if kept.origin is None else kept.origin
    changed = ", ".join(f"{key} {before.get(key)} -> {new}" for key, new in wanted.items() if before.get(key) != new)
    if not changed:
        return Choice.KEEP
    if begun or not kept.by_run:
        return Refuse(
            f"is not the tokenizer of this config ({changed}; files of a corpus count with their names, sizes and "
            f"times)"
        )
    return Choice.MAKE


def settle_tokenizer(config: DataConfig, source: Source, *, vocab_size: int, folder: Path) -> Tokenizer:
    """The tokenizer of the run of `folder`, which keeps it from now on.

    Raises:
        DataError: when the config describes another one than the folder must keep, or one that cannot be made.
    """
    file = next(iter(tokenizers_in(folder)), None)
    given = _given(config)
    wanted = _origin(config, source, vocab_size) if given is None else {"fingerprint": given.fingerprint}
    kept = None if file is None else _kept(file, wanted)
    decision = decide(kept, wanted, begun=has_begun(folder))
    if isinstance(decision, Refuse):
        raise DataError(f"{file or folder} {decision.reason}; choose another training.run_dir")
    if file is not None and decision is Choice.KEEP:
        return given or load_tokenizer(file)
    made = given or _make(config, source, vocab_size)
    if file is not None:
        file.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TOKENIZER_ORIGIN).write_text(json.dumps(wanted), encoding="utf-8")  # first: alone it means nothing
    made.save(folder / TOKENIZER)
    return made


def _given(config: DataConfig) -> Tokenizer | None:
    """The tokenizer of the file that the config names; None where it names none, or one that is missing."""
    if config.tokenizer == "train" or not Path(config.tokenizer).expanduser().exists():
        return None
    return load_tokenizer(config.tokenizer)


def _origin(config: DataConfig, source: Source, vocab_size: int) -> Origin | None:
    """What a tokenizer is trained for; None where the config names a file instead."""
    if config.tokenizer != "train":
        return None
    documents = len(source.train)
    return {"source": source.name, "documents": documents, "fields": _fields(config), "vocab_size": vocab_size}


def _kept(file: Path, wanted: Origin | None) -> Kept:
    record = file.with_name(TOKENIZER_ORIGIN)
    by_run = record.exists()
    if wanted is None:
        return Kept(None, by_run)
    if "fingerprint" in wanted:
        return Kept({"fingerprint": load_tokenizer(file).fingerprint}, by_run)
    try:
        return Kept(dict(json.loads(record.read_text(encoding="utf-8"))) if by_run else None, by_run)
    except (ValueError, TypeError):
        raise DataError(f"{record} is damaged; remove it if {file} is the run's own") from None


def _make(config: DataConfig, source: Source, vocab_size: int) -> Tokenizer:
    if config.tokenizer != "train":
        return load_tokenizer(config.tokenizer)  # raises, since the file is missing
    every = itertools.chain.from_iterable(texts(source.train, key) for key in _fields(config))
    made = train_tokenizer(every, vocab_size=vocab_size)
    _log.info("trained a tokenizer of %d ids on %d documents", made.vocab_size, len(source.train))
    return made


def _fields(config: DataConfig) -> list[str]:
    return [key for key in (config.text_key, config.target_key) if key is not None]
