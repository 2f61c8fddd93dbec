"""Parameters that a run starts from: another run's newest checkpoint, or a Hugging Face directory.

The run's own config describes the model; what it was trained as must agree, because another epsilon or RoPE base would
load without complaint and quietly be another function. Out of scope: resuming, which restores a whole state.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxllm.config import ModelConfig, RunConfig
from jaxllm.config.file import ConfigError, load_config
from jaxllm.data import DataError, first_line
from jaxllm.data.tokenizer import Tokenizer, load_tokenizer, tokenizers_in
from jaxllm.interop.hf import load_hf
from jaxllm.models import Model, abstract_params, build
from jaxllm.run.checkpoint import UNREADABLE, CheckpointError

_log = logging.getLogger(__name__)

# Settings that change no output for given parameters, or only what happens in training.
_FREE = ("layers", "remat", "attention", "init_std", "init_factor", "dropout_rate")


def load_initial_params(path: str | Path, model: Model, *, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """Float32 parameters for `model` from a run folder or a Hugging Face directory.

    A `tokenizer` that is none of those in the folder is a warning: it may be a repaired one.

    Raises:
        ConfigError: when `path` is neither, or holds another model, naming the settings that differ.
        CheckpointError, InteropError: when its weights cannot be read.
    """
    folder = Path(path).expanduser()
    if (folder / "config.yaml").is_file():
        found, params = load_run(folder)
        _check_same(folder, found.model, model.config)
    elif (folder / "config.json").is_file():
        source, params = load_hf(folder, dtype=jnp.float32)
        _check_same(folder, source.config, model.config)
    else:
        raise ConfigError(
            f"training.init_from {folder} is neither a run folder (config.yaml) nor a Hugging Face directory "
            f"(config.json)"
        )
    _log.info("initial parameters from %s", folder)
    theirs = tokenizers_in(folder)
    if tokenizer is not None and theirs and not any(_is(tokenizer, file) for file in theirs):
        _log.warning(
            "data.tokenizer is another one than %s, whose ids these parameters know; set data.tokenizer=%s unless "
            "that is on purpose",
            theirs[0],
            theirs[0],
        )
    return params


def _is(tokenizer: Tokenizer, file: Path) -> bool:
    try:
        return load_tokenizer(file).fingerprint == tokenizer.fingerprint
    except DataError:  # one that can't be read here is none that the run reads
        return False


def load_run(folder: str | Path) -> tuple[RunConfig, dict[str, Any]]:
    """Config and float32 parameters of a run's newest whole checkpoint; the folder is left as it is.

    The model's attention is `auto`: a kernel that training asked for by name may be another machine's.

    Raises:
        ConfigError: when there is no run.
        CheckpointError: when it has no readable checkpoint.
    """
    folder = Path(folder).expanduser()
    config = load_config(folder / "config.yaml")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="auto"))
    checkpoints = folder.absolute() / "checkpoints"
    steps = sorted((int(item.name) for item in checkpoints.glob("*") if item.name.isdigit()), reverse=True)
    abstract = {"params": abstract_params(build(config.model))}
    arguments = ocp.checkpoint_utils.construct_restore_args(abstract)
    for step in steps:
        wanted = ocp.args.PyTreeRestore(item=abstract, restore_args=arguments, partial_restore=True)
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                return config, jax.device_put(reader.restore(checkpoints / str(step) / "state", args=wanted)["params"])
        except UNREADABLE as error:
            _log.warning("checkpoint %d in %s is damaged (%s)", step, checkpoints, first_line(error))
    if not steps:
        raise CheckpointError(
            f"no checkpoint in {checkpoints} yet; train the run until its first (training.save_every)"
        )
    raise CheckpointError(f"no readable checkpoint in {checkpoints} (tried steps {steps})")


def _check_same(folder: Path, there: ModelConfig, here: ModelConfig) -> None:
    old, new = dataclasses.asdict(there), dataclasses.asdict(here)
    ignored = {*_FREE, *there.resizable}
    differing = [
        f"model.{key}: {old.get(key)} -> {new.get(key)}"
        for key in dict.fromkeys([*old, *new])
        if key not in ignored and old.get(key) != new.get(key)
    ]
    if differing:
        listed = "\n  ".join(differing)
        raise ConfigError(
            f"training.init_from {folder} holds another model; these settings differ (there -> here):\n  {listed}\n"
            f"set them in the config as they are there"
        )
