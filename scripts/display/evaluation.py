"""The evaluation of what is given by its path: a run, a step of it, or a Hugging Face directory."""

import dataclasses
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import jax

from jaxllm.config import DataConfig, RunConfig
from jaxllm.config.file import ConfigError, load_config, with_overrides
from jaxllm.data.sources import Source
from jaxllm.data.tokenizer import tokenizers_in
from jaxllm.interop.hf import load_hf_config
from jaxllm.run.evaluation import evaluate
from jaxllm.run.feed import open_run_pipeline
from jaxllm.run.parts import PARTS
from jaxllm.run.start import load_initial_params
from jaxllm.run.steps import make_steps
from jaxllm.storage.folder import CONFIG, DATA, TOKENIZER, Kind, find_model
from jaxllm.training.program import program_of
from jaxllm.training.sharding import check_rows, make_mesh

_log = logging.getLogger(__name__)


def named_sets(paths: Sequence[str]) -> list[str]:
    """The setting `data.validation` of PATHs and NAME=PATHs; a PATH has the name of its file up to the first point.

    Raises:
        ValueError: when two have the same name.
    """
    pairs = [each.rpartition("=")[::2] for each in paths]
    sets = {name or re.sub(r"\W+", "_", Path(path).name.split(".")[0]): path for name, path in pairs}
    if len(sets) < len(pairs):
        raise ValueError("sets of --data need different names (NAME=PATH)")
    return [f"data.validation={json.dumps(sets)}"] if sets else []


def evaluate_path(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, float]:
    """The metrics of `evaluate` for RUN (its newest checkpoint), RUN@STEP or a Hugging Face directory, as they are.

    `overrides` are settings such as `data.validation.mine=PATH`, which a Hugging Face directory needs. Raises
    ConfigError, CheckpointError, InteropError or DataError, naming what is missing or cannot be read.
    """
    folder, kind, _ = find_model(path)
    if kind is Kind.RUN:
        config = load_config(folder / CONFIG)
    else:
        model = load_hf_config(folder)
        data = DataConfig(objective=model.objectives[0], sequence_length=min(256, model.context or 256))
        config = RunConfig(model=model, data=data)
    if (folder / PARTS).is_file():
        _log.warning("%s has parts of its own (%s), which an evaluation from outside does not use", folder, PARTS)
    config = with_overrides(config, ["training.branch_from=null", *overrides])
    tokenizer = str(next(iter(tokenizers_in(folder)), folder / TOKENIZER))
    data, source = dataclasses.replace(config.data, workers=0, streams=1, tokenizer=tokenizer), None
    if data.validation:  # what the run is trained on is not read
        data = dataclasses.replace(data, source="stdlib", path=None)
        source = Source("none", [{data.text_key: "-"}], ())
    elif kind is Kind.HUGGING_FACE:
        raise ConfigError(f"{folder} has no validation set; name one, e.g. data.validation.mine=PATH")
    config, mesh = dataclasses.replace(config, data=data), make_mesh(fsdp=config.sharding.fsdp)
    check_rows(batch_size=config.training.batch_size, accumulation=1, devices=jax.device_count())
    program = program_of(config, mesh)
    with tempfile.TemporaryDirectory() as place:
        if source is None and (folder / DATA).is_dir():
            shutil.copytree(folder.absolute() / DATA, Path(place, DATA), copy_function=os.symlink)
        with closing(open_run_pipeline(config, Path(place), source=source)) as pipeline:
            return evaluate(make_steps(program, mesh), load_initial_params(path, program.model, mesh=mesh), pipeline)
