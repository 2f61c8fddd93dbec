"""The folder of a run: its config decides whether a second start resumes it or is refused; one process at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxllm.config import RunConfig
from jaxllm.config.file import ConfigError, config_differences, dump_config, load_config
from jaxllm.data.pipeline import has_begun
from jaxllm.ops.backend import has_bfloat16

_log = logging.getLogger(__name__)

# What may change between two starts of one run: it moves no number of the training.
_FREE = (
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
    "data.tokenizer",  # the folder keeps its own, and takes no other
    "model.layers",
    "model.remat",
    "model.attention",
)


class RunFolderError(ConfigError):
    """A run folder that cannot be used; the message says why and what to do."""


@contextlib.contextmanager
def open_run_folder(config: RunConfig) -> Iterator[Path]:
    """The folder for this process alone, made where it is new, after a look at whether the run in it is this one.

    A run that has made no step, such as one that was too large for its device, leaves its folder to the next config.

    Raises:
        RunFolderError: when it cannot be written, is at work in another process, is something else, or holds a run of
            another config (naming the differing keys).
    """
    folder = Path(config.training.run_dir).expanduser()
    if (folder / "config.json").exists():
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
            if (folder / "config.yaml").exists() and has_begun(folder):
                _check_same(folder / "config.yaml", config)
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
    if (folder / "config.yaml").exists() and has_begun(folder):
        with contextlib.suppress(ConfigError):  # `open_run_folder` reports it
            islands = {**islands, **_residual_of(load_config(folder / "config.yaml"))}
    elif has_bfloat16():
        islands = {**islands, "residual": "bfloat16"}
        _log.info("precision.islands.residual: bfloat16, this device's default for a float16 T5; float32 is more exact")
    return dataclasses.replace(config, precision=dataclasses.replace(config.precision, islands=islands))


def _residual_of(config: RunConfig) -> dict[Any, Any]:
    return {key: dtype for key, dtype in config.precision.islands.items() if key == "residual"}


def write_config(config: RunConfig, folder: Path) -> None:
    """Writes the resolved config, once nothing can refuse the run any more."""
    path = folder / "config.yaml"
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
    if Path(path).name != "config.yaml" or not (here / "checkpoints").is_dir() or chosen:
        return
    if here.resolve() != there.resolve():
        raise RunFolderError(
            f"{path} is the config of the run beside it, but its training.run_dir is {there}; set "
            f"training.run_dir={here} to go on with the run beside it, or {there} for that one"
        )


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other processes out; the lock goes with the process, however that ends."""
    with (folder / ".lock").open("w") as lock:
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
    differing = [line for line in config_differences(old, config) if not line.startswith(_FREE)]
    if differing:
        listed = "\n  ".join(differing)
        raise RunFolderError(
            f"{path.parent} holds a run of another config; these keys differ (there -> here):\n  {listed}\n"
            f"resume it with its own config, or choose another training.run_dir"
        )
