"""The folder of a run: its config decides whether a second start resumes it or is refused."""

from __future__ import annotations

import tempfile
from pathlib import Path

from jaxllm.config import RunConfig
from jaxllm.config_file import ConfigError, config_differences, dump_config, load_config

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
    "model.layers",
    "model.remat",
    "model.attention",
)


class RunFolderError(ConfigError):
    """A run folder that cannot be used; the message says why and what to do."""


def open_run_folder(config: RunConfig) -> Path:
    """Creates the folder with the resolved config in it, or checks that the one there is of the same run.

    A run that has made no step, such as one that was too large for its device, leaves its folder to the next config.

    Raises:
        RunFolderError: when it cannot be written, or holds a run of another config (naming the differing keys).
    """
    folder = Path(config.training.run_dir)
    path = folder / "config.yaml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if path.exists() and _has_begun(folder):
            _check_same(path, config)
        _replace(path, dump_config(config))
    except OSError as error:
        raise RunFolderError(
            f"cannot write to training.run_dir {folder}: {error.strerror or error}; choose a writable folder "
            f"with free space, e.g. training.run_dir=runs/again"
        ) from error
    return folder


def _has_begun(folder: Path) -> bool:
    metrics, checkpoints = folder / "metrics.jsonl", folder / "checkpoints"
    return (metrics.exists() and metrics.stat().st_size > 0) or (checkpoints.is_dir() and any(checkpoints.iterdir()))


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


def _replace(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
