"""The folder of a run: what is in it, who may use it, and which config may continue the run in it.

config.yaml              the resolved config, written when nothing can refuse the run any more
tokenizer.json, .model   the run's tokenizer, and tokenizer_origin.json: what it was made from
data/                    the prepared corpus, unless data.cache_dir is set
checkpoints/STEP/        state, data position and validation loss (`jaxllm.run.checkpoint`)
checkpoints.damaged/     checkpoints that could not be read
metrics.jsonl            one row of numbers per line; tensorboard/ repeats them
sample.txt, loss.png     written after the last step
.lock                    held by the process that trains
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import fcntl
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxllm.config import DataConfig, RunConfig
from jaxllm.config.file import ConfigError, config_differences, dump_config, load_config
from jaxllm.data import DataError
from jaxllm.data.sources import Source
from jaxllm.data.tokenizer import Tokenizer, load_tokenizer, tokenizers_in
from jaxllm.data.tokenizer_choice import (
    Choice,
    Kept,
    Origin,
    Refuse,
    decide,
    given_tokenizer,
    make_tokenizer,
    origin_of,
)
from jaxllm.interop.safetensors_dir import INDEX, SINGLE
from jaxllm.ops.backend import has_bfloat16

_log = logging.getLogger(__name__)

CONFIG = "config.yaml"
TOKENIZER = "tokenizer.json"
TOKENIZER_ORIGIN = "tokenizer_origin.json"
DATA = "data"
CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
SAMPLE = "sample.txt"
CURVE = "loss.png"
_LOCK = ".lock"
_HUGGING_FACE_CONFIG = "config.json"

# What may change between two starts of one run: it moves no number of the training.
_MAY_CHANGE = (
    "training.run_dir",
    "training.log_every",
    "training.eval_every",
    "training.eval_batches",
    "training.save_every",
    "training.keep",
    "training.sample_prompt",
    "training.sample_tokens",
    "training.compilation_cache",
    "data.cache_dir",
    "data.workers",
    "data.tokenizer",  # the folder keeps its own, and takes no other
    "model.layers",
    "model.remat",
    "model.attention",
)


class RunFolderError(ConfigError):
    """A run folder that cannot be used; the message says why and what to do."""


class Kind(enum.Enum):
    """What a folder holds."""

    RUN = enum.auto()
    HUGGING_FACE = enum.auto()


def kind_of(path: str | Path) -> Kind | None:
    """Run folder or Hugging Face directory; None for a folder that is neither."""
    folder = Path(path).expanduser()
    if (folder / CONFIG).is_file():
        return Kind.RUN
    return Kind.HUGGING_FACE if (folder / _HUGGING_FACE_CONFIG).is_file() else None


def has_begun(folder: Path) -> bool:
    """Whether the run of a folder has made a step."""
    metrics, checkpoints = folder / METRICS, folder / CHECKPOINTS
    return (metrics.exists() and metrics.stat().st_size > 0) or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def _holds_begun_run(folder: Path) -> bool:
    return (folder / CONFIG).exists() and has_begun(folder)


@contextlib.contextmanager
def open_run_folder(config: RunConfig) -> Iterator[Path]:
    """The folder for this process alone, made where it is new, after a look at whether the run in it is this one.

    A run that has made no step, such as one that was too large for its device, leaves its folder to the next config.

    Raises:
        RunFolderError: when it cannot be written, is at work in another process, is something else, or holds a run of
            another config (naming the differing keys).
    """
    folder = Path(config.training.run_dir).expanduser()
    if (folder / _HUGGING_FACE_CONFIG).exists():
        raise RunFolderError(
            f"training.run_dir {folder} is a Hugging Face directory; choose another, with "
            f"training.init_from={folder} to start from its parameters"
        )
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
            stack.enter_context(_alone(folder))
            if _holds_begun_run(folder):
                _check_same(folder / CONFIG, config)
        except OSError as error:
            raise RunFolderError(
                f"cannot write to training.run_dir {folder}: {error.strerror or error}; choose a writable folder "
                f"with free space, e.g. training.run_dir=runs/again"
            ) from error
        yield folder


def settle_residual(config: RunConfig) -> RunConfig:
    """The run with the dtype of a float16 T5's residual stream: bfloat16 where the hardware has it.

    A float32 stream moves a fifth more bytes, and T5's outgrows float16. What config.yaml of a begun run has is kept,
    float32 where it has none; `precision.islands.residual` in the config of a new run decides by itself.
    """
    islands = config.precision.islands
    if not config.model.outgrows_float16 or config.precision.compute != "float16" or "residual" in islands:
        return config
    folder = Path(config.training.run_dir).expanduser()
    if _holds_begun_run(folder):
        with contextlib.suppress(ConfigError):  # `open_run_folder` reports it
            islands = {**islands, **_residual_of(load_config(folder / CONFIG))}
    elif has_bfloat16():
        islands = {**islands, "residual": "bfloat16"}
        _log.info("precision.islands.residual: bfloat16, this device's default for a float16 T5; float32 is more exact")
    return dataclasses.replace(config, precision=dataclasses.replace(config.precision, islands=islands))


def _residual_of(config: RunConfig) -> dict[Any, Any]:
    return {key: dtype for key, dtype in config.precision.islands.items() if key == "residual"}


def write_config(config: RunConfig, folder: Path) -> None:
    """Writes the resolved config, once nothing can refuse the run any more."""
    path = folder / CONFIG
    partial = path.with_suffix(".partial")
    partial.write_text(dump_config(config), encoding="utf-8")
    partial.replace(path)


def check_in_place(config: RunConfig, path: str | Path, overrides: Sequence[str]) -> None:
    """Refuses a run folder's own config.yaml where the folder was moved or copied: it names another folder.

    Args:
        config: what came of the file and the overrides.
        path: the file.
        overrides: as on the command line; one of training.run_dir says what is wanted.

    Raises:
        RunFolderError: naming both folders.
    """
    here, there = Path(path).parent, Path(config.training.run_dir).expanduser()
    chosen = any(each.startswith("training.run_dir=") for each in overrides)
    if Path(path).name != CONFIG or not (here / CHECKPOINTS).is_dir() or chosen:
        return
    if here.resolve() != there.resolve():
        raise RunFolderError(
            f"{path} is the config of the run beside it, but its training.run_dir is {there}; set "
            f"training.run_dir={here} to go on with the run beside it, or {there} for that one"
        )


def check_apart(config: DataConfig, run_dir: Path) -> None:
    """Refuses a run folder among the user's documents: what the run writes would be some of them.

    Raises:
        DataError: naming both folders.
    """
    root = Path(config.path or "").expanduser()
    if config.source == "files" and run_dir.resolve().is_relative_to(root.resolve()):
        raise DataError(
            f"the run's folder {run_dir} lies in data.path {root}, whose documents would then be its {METRICS} and "
            f"{SAMPLE} too; choose a training.run_dir outside, or put the documents into a folder of their own"
        )


def settle_tokenizer(config: DataConfig, source: Source, *, vocab_size: int, folder: Path) -> Tokenizer:
    """The tokenizer of the run of `folder`, which keeps it from now on.

    Raises:
        DataError: when the config describes another one than the folder must keep, or one that cannot be made.
    """
    file = next(iter(tokenizers_in(folder)), None)
    given = given_tokenizer(config)
    wanted = origin_of(given, config, source, vocab_size=vocab_size)
    kept = None if file is None else _kept(file, wanted)
    decision = decide(kept, wanted, begun=has_begun(folder))
    if isinstance(decision, Refuse):
        raise DataError(f"{file or folder} {decision.reason}; choose another training.run_dir")
    if file is not None and decision is Choice.KEEP:
        return given or load_tokenizer(file)
    made = given or make_tokenizer(config, source, vocab_size=vocab_size)
    if file is not None:
        file.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TOKENIZER_ORIGIN).write_text(json.dumps(wanted), encoding="utf-8")  # first: alone it means nothing
    made.save(folder / TOKENIZER)
    return made


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


def check_target(target: str | Path) -> None:
    """Refuses a folder to convert into that holds a model: it would be lost, or the folder would be two things.

    Raises:
        FileExistsError: naming what is there.
    """
    folder = Path(target).expanduser()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; choose another folder")
    if (folder / CHECKPOINTS).exists() or (folder / CONFIG).exists():
        raise FileExistsError(f"{folder} already holds a run; choose another folder")
    if (folder / _HUGGING_FACE_CONFIG).exists():
        raise FileExistsError(f"{folder} is a Hugging Face directory; choose another folder")
    others = [file.name for file in tokenizers_in(folder)] + [n for n in (SINGLE, INDEX) if (folder / n).exists()]
    if others:
        raise FileExistsError(f"{folder} already holds {', '.join(others)}; choose another folder")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other processes out; the lock goes with the process, however that ends."""
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderError(
                f"another process is training the run in {folder}; wait for it, stop it, or choose another "
                f"training.run_dir"
            ) from None
        except OSError as error:
            _log.warning("%s cannot be locked (%s): start no second process on it", folder, error.strerror)
        yield


def _check_same(path: Path, config: RunConfig) -> None:
    try:
        old = load_config(path)
    except ConfigError as error:
        raise RunFolderError(f"the config of the run there cannot be read: {error}") from None
    differing = config_differences(old, config, ignored=_MAY_CHANGE)
    if differing:
        listed = "\n  ".join(differing)
        raise RunFolderError(
            f"{path.parent} holds a run of another config; these keys differ (there -> here):\n  {listed}\n"
            f"resume it with its own config, or choose another training.run_dir"
        )
