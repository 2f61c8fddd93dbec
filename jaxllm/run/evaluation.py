"""The validation of a run: loss, bits per byte, accuracy, and the spans that an encoder-decoder predicts whole."""

import dataclasses
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.config import DataConfig, RunConfig
from jaxllm.config.file import ConfigError, load_config, with_overrides
from jaxllm.data.packing import segments_of
from jaxllm.data.pipeline import Pipeline
from jaxllm.data.sources import Source
from jaxllm.data.tokenizer import tokenizers_in
from jaxllm.interop.hf import load_hf_config
from jaxllm.run.feed import open_run_pipeline
from jaxllm.run.parts import PARTS
from jaxllm.run.record import count_rows
from jaxllm.run.start import load_initial_params
from jaxllm.run.steps import Steps, make_steps, or_by_blocks
from jaxllm.storage.folder import CONFIG, DATA, TOKENIZER, Kind, find_model
from jaxllm.training.program import program_of
from jaxllm.training.sharding import check_rows, fetch, make_mesh, place_rows
from jaxllm.training.spans import count_spans

_log = logging.getLogger(__name__)


def evaluate(steps: Steps, params: Any, pipeline: Pipeline) -> dict[str, float]:
    """Metrics of the first `training.eval_batches` validation batches, which are always the same.

    Returns:
        loss (per token), bits_per_byte (T5: bits_per_target_byte), accuracy, and spans_exact where there are spans.
        With `data.validation` they are those of the first set, and NAME/loss and so on follow for each set.
    """

    def measure(steps: Steps) -> dict[str | None, dict[str, float]]:
        return {name: _measure(steps, params, pipeline, name) for name in pipeline.sets or [None]}

    _, found = or_by_blocks(steps, measure)
    named = {f"{name}/{key}": value for name, values in found.items() for key, value in values.items() if name}
    return next(iter(found.values())) | named


def _measure(steps: Steps, params: Any, pipeline: Pipeline, name: str | None) -> dict[str, float]:
    config, tokenizer = steps.program.config, pipeline.tokenizer
    sums = np.zeros(3)
    size = exact = spans = 0.0
    for batch in pipeline.validation(config.training.eval_batches, name):
        placed = place_rows(batch, steps.mesh)
        found = jax.device_get(steps.eval_step(params, placed))
        sums += (found.nll, found.weight, found.correct)
        size += count_rows(batch, tokenizer.token_bytes)[:, 1].sum(dtype=float)
        if steps.predict is not None:
            predicted = fetch(steps.predict(params, placed))
            whole, total = count_spans(predicted, batch["targets"], segments_of(batch)[1], tokenizer.sentinel_ids)
            exact += whole
            spans += total
    nll, weight, correct = sums.tolist()
    weight = max(weight, 1.0)
    return {
        "loss": nll / weight,
        config.model.metric: nll / math.log(2) / max(size, 1.0),
        "accuracy": correct / weight,
        **({"spans_exact": exact / spans} if spans else {}),
    }


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
