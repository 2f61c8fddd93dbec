"""The state that a run starts from: its newest checkpoint, parameters from elsewhere, or new ones.

Parameters come from another run's newest checkpoint or from a Hugging Face directory. The run's own config describes
the model; what it was trained as must agree, because with another epsilon or RoPE base they would load without an error
and compute other outputs.
"""

import dataclasses
import logging
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxllm.config import ModelConfig, RunConfig
from jaxllm.config.file import ConfigError, config_differences, load_config
from jaxllm.data import DataError
from jaxllm.data.tokenizer import Tokenizer, load_tokenizer, tokenizers_in
from jaxllm.interop.hf import load_hf
from jaxllm.models import Model, abstract_params, build
from jaxllm.run.compiled import explained
from jaxllm.storage.checkpoint import Checkpoints, load_params
from jaxllm.storage.checkpoint_reading import CheckpointError, Restored, restore_newest
from jaxllm.storage.folder import CHECKPOINTS, CONFIG, Kind, branch_point, checkpoint_steps, find_model
from jaxllm.training.program import Program
from jaxllm.training.sharding import state_shardings, with_shardings
from jaxllm.training.train_step import TrainState

_log = logging.getLogger(__name__)

# Settings that change no output for given parameters, or only what happens in training.
_NO_OUTPUT = ("layers", "remat", "attention", "init_std", "init_factor", "dropout_rate")


class TrainingStopped(RuntimeError):
    """Training cannot continue; the message names the step and the last good checkpoint."""


def find_start(program: Program, checkpoints: Checkpoints, *, mesh: Mesh | None, tokenizer: Tokenizer) -> Restored:
    """The newest checkpoint of the run; without one, that of `training.branch_from`, or step 0.

    Step 0 has the parameters of `training.init_from`, or new ones.

    Raises:
        CheckpointError: as `Checkpoints.restore`.
        ConfigError, CheckpointError, InteropError: as `load_initial_params`.
        DeviceError: when the device has no room for the state.
    """
    abstract = program.abstract_state()
    layout = None if mesh is None else state_shardings(abstract, mesh)
    source = program.config.training.init_from
    with explained("initial state"):
        restored = checkpoints.restore(with_shardings(abstract, mesh))
        if restored is not None:
            return restored
        if branch := branch_point(program.config):
            return _branch(*branch, with_shardings(abstract, mesh))
        if not source:
            return Restored(0, jax.jit(program.fresh_state, out_shardings=layout)())
        params = load_initial_params(source, program.model, tokenizer=tokenizer, mesh=mesh)
        return Restored(0, jax.jit(program.state_of, out_shardings=layout)(params))


def _branch(run: Path, step: int | None, abstract: TrainState) -> Restored:
    """The state of another run, whose folder is only read."""
    folder = run / CHECKPOINTS
    steps = [kept for kept in checkpoint_steps(folder) if step in (None, kept)]
    found, damaged = restore_newest(folder, steps, abstract)
    if found is None:
        raise CheckpointError(f"training.branch_from: no checkpoint in {folder} can be read (tried steps {damaged})")
    return found._replace(branched=True)


def stop(folder: Path, start: Restored, step: int, reason: str) -> NoReturn:
    """Stops a run whose values are bad, with what to do about it; `start` is what remains in its checkpoint folder."""
    where, again = f"step {start.step} in {folder}", f", from new parameters or with training.init_from={folder.parent}"
    if start.data is None:
        where, again = "none yet", ""
    raise TrainingStopped(
        f"{reason} at step {step}; the last good checkpoint is {where}. Lower optimizer.learning_rate, lengthen "
        f"warmup_steps or tighten clip_norm, and start another training.run_dir{again}"
    )


def load_initial_params(
    path: str | Path, model: Model, *, tokenizer: Tokenizer | None = None, mesh: Mesh | None = None
) -> dict[str, Any]:
    """Float32 parameters for `model` from RUN, RUN@STEP or a Hugging Face directory, each device reading its part.

    A `tokenizer` that is none of those in the folder is a warning: it may be a repaired one.

    Raises:
        ConfigError: when `path` is neither, or holds another model, naming the settings that differ.
        CheckpointError, InteropError: when its weights cannot be read.
    """
    folder, kind, _ = find_model(path)
    if kind is Kind.RUN:
        found, params = read_run(path, mesh)
        _check_same(folder, found.model, model.config)
    else:
        source, params = load_hf(
            folder, dtype=jnp.float32, place=None if mesh is None else partial(with_shardings, mesh=mesh)
        )
        _check_same(folder, source.config, model.config)
    _log.info("initial parameters from %s", folder)
    theirs = tokenizers_in(folder)
    if tokenizer is not None and theirs and not any(_is(tokenizer, file) for file in theirs):
        fix = f"set data.tokenizer={theirs[0]} unless that is on purpose"
        _log.warning("data.tokenizer differs from %s, with which these parameters were trained; %s", theirs[0], fix)
    return params


def _is(tokenizer: Tokenizer, file: Path) -> bool:
    try:
        return load_tokenizer(file).fingerprint == tokenizer.fingerprint
    except DataError:  # an unreadable tokenizer is not the run's
        return False


def read_run(folder: str | Path, mesh: Mesh | None = None, *, average: bool = True) -> tuple[RunConfig, dict[str, Any]]:
    """Config and float32 parameters of RUN's newest whole checkpoint, or of RUN@STEP, on a mesh; RUN is left as it is.

    A run with `optimizer.ema` gives the average of its parameters, unless `average` is False. The model's attention is
    `auto`: a kernel that training asked for by name may be another machine's.

    Raises:
        ConfigError: when there is no run.
        CheckpointError: when it has no readable checkpoint.
    """
    folder, kind, step = find_model(folder)
    if kind is not Kind.RUN:
        raise ConfigError(f"{folder} is a Hugging Face directory, not a run folder; open it with load_hf")
    config = load_config(folder / CONFIG)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="auto"))
    shapes = abstract_params(build(config.model))
    shapes = shapes if mesh is None else with_shardings(shapes, mesh)
    return config, load_params(folder / CHECKPOINTS, shapes, step, average=average)


def _check_same(folder: Path, there: ModelConfig, here: ModelConfig) -> None:
    ignored = [f"model.{key}" for key in (*_NO_OUTPUT, *there.resizable)]
    differing = config_differences(there, here, ignored=ignored, prefix="model.")
    if differing:
        listed = "\n  ".join(differing)
        raise ConfigError(
            f"training.init_from {folder} holds another model; these settings differ (there -> here):\n  {listed}\n"
            f"set them in the config as they are there"
        )
