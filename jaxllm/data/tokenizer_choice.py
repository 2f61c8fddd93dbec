"""Which tokenizer a config describes, and whether it may replace one that is kept already.

A run that has made a step never gets another tokenizer, since its parameters belong to these ids. Before that the
config decides, but a tokenizer that a person put there is not replaced.
"""

import enum
import itertools
import logging
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.config import DataConfig
from jaxllm.data.records import texts
from jaxllm.data.sources import Source
from jaxllm.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

_log = logging.getLogger(__name__)

_TRAINING = "data.tokenizer: train (or set it to a tokenizer.json)"

# What determines a tokenizer: the fingerprint of a given file, or the corpus and size of a trained one.
Origin = dict[str, Any]


class Kept(NamedTuple):
    """A tokenizer that is kept for a run."""

    origin: Origin | None  # with the keys of the wanted one; None where no file records it
    by_run: bool  # whether a run made it; otherwise a person put it there


class Choice(enum.Enum):
    """The decision about a tokenizer."""

    KEEP = enum.auto()
    MAKE = enum.auto()
    MAKE_AGAIN = enum.auto()  # and compare it with what the run's checkpoints hold


class Refuse(NamedTuple):
    """The config is refused; `reason` completes a message that begins with the kept tokenizer's file or its folder."""

    reason: str


def decide(kept: Kept | None, wanted: Origin | None, *, begun: bool) -> Choice | Refuse:
    """Keeps a tokenizer, makes the one that the config describes, or refuses the config.

    | kept                            | wanted                     | begun | decision                          |
    |---------------------------------|----------------------------|-------|-----------------------------------|
    | none                            | any                        | no    | make                              |
    | none                            | its file is missing (None) | yes   | refuse: the ids are lost          |
    | none                            | any other                  | yes   | make again, and compare           |
    | any                             | its file is missing (None) | no    | make, which names the file        |
    | any                             | its file is missing (None) | yes   | keep: the run or the file moved   |
    | of the same origin              | any                        | any   | keep                              |
    | of no recorded origin           | trained                    | any   | keep                              |
    | of another origin, by a person  | any                        | any   | refuse                            |
    | of another origin, by a run     | any                        | no    | make, which replaces it           |
    | of another origin, by a run     | any                        | yes   | refuse                            |

    `wanted` is the origin that the config describes; `begun` is whether the run has made a step.
    """
    if kept is None:
        lost = Refuse("holds a run whose tokenizer is not there any more") if wanted is None else Choice.MAKE_AGAIN
        return lost if begun else Choice.MAKE
    if wanted is None:
        return Choice.KEEP if begun else Choice.MAKE
    before = wanted if kept.origin is None else kept.origin
    changed = ", ".join(f"{key} {before.get(key)} -> {new}" for key, new in wanted.items() if before.get(key) != new)
    if not changed:
        return Choice.KEEP
    if begun or not kept.by_run:
        counted = "files of a corpus count with their names, sizes and times"
        return Refuse(f"is not the tokenizer of this config ({changed}; {counted})")
    return Choice.MAKE


def given_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The tokenizer of the file in the config; None where the config has no file, or a missing one."""
    if config.tokenizer == "train" or not Path(config.tokenizer).expanduser().exists():
        return None
    return load_tokenizer(config.tokenizer)


def origin_of(given: Tokenizer | None, config: DataConfig, source: Source, *, vocab_size: int) -> Origin | None:
    """The origin that the config describes; `given` is that of `given_tokenizer`."""
    if given is not None:
        return {"fingerprint": given.fingerprint}
    if config.tokenizer != "train":
        return None
    documents = len(source.documents(_TRAINING))
    return {"source": source.name, "documents": documents, "fields": _fields(config), "vocab_size": vocab_size}


def make_tokenizer(config: DataConfig, source: Source, *, vocab_size: int) -> Tokenizer:
    """The tokenizer that the config describes, loaded or trained; DataError when neither is possible."""
    if config.tokenizer != "train":
        return load_tokenizer(config.tokenizer)
    documents = source.documents(_TRAINING)
    _log.info("training a tokenizer of %d ids on %d documents", vocab_size, len(documents))
    every = itertools.chain.from_iterable(texts(documents, key) for key in _fields(config))
    return train_tokenizer(every, vocab_size=vocab_size)


def _fields(config: DataConfig) -> list[str]:
    return [key for key in (config.text_key, config.target_key) if key is not None]
