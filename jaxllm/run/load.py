"""Models from disk: of a run folder, or with their tokenizer of a run folder or a Hugging Face directory."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.generation.text import TextModel
from jaxllm.interop.hf import SpecialIds, load_hf, special_ids
from jaxllm.interop.safetensors_dir import read_json
from jaxllm.models import Model, build, decoder_of
from jaxllm.run.start import read_run
from jaxllm.storage.folder import Kind, find_model


def load_run(folder: str | Path, *, dtype: str = "float32", average: bool = True) -> tuple[Model, dict[str, Any]]:
    """Model and float32 parameters of a run's newest whole checkpoint, the counterpart of `load_hf` for a run folder.

    Args:
        folder: `training.run_dir` of the run; RUN@STEP is the checkpoint of a step.
        dtype: of the computation.
        average: take the average of the parameters, if the run has one (`optimizer.ema`), as all that loads a run.

    Raises:
        ConfigError: when the folder is not a run folder.
        CheckpointError: when it has no readable checkpoint.

    Example:
        model, params = jaxllm.load_run("runs/llama_tiny")
        logits = model.apply({"params": params}, tokens)
    """
    config, params = read_run(folder, average=average)
    return build(config.model, dtype=jnp.dtype(dtype)), params


def load_text_model(path: str | Path, *, dtype: str = "float32", int8: bool = False) -> TextModel:
    """The model of a run (RUN, its newest checkpoint, or RUN@STEP) or of a Hugging Face directory, with its tokenizer.

    Args:
        path: folder.
        dtype: of the computation.
        int8: store the matrices as int8.

    Raises:
        ConfigError: when the folder is neither a run folder nor a Hugging Face directory.
        CheckpointError, InteropError, DataError: when the files in it cannot be read.
    """
    text_model = read_text_model(path, dtype)
    return text_model._replace(params=decoder_of(text_model.model).prepare(text_model.params, int8=int8))


def read_text_model(path: str | Path, dtype: str = "float32") -> TextModel:
    """As `load_text_model`, with the parameters in the layout of training, as `jaxllm.score` needs them."""
    folder, kind, _ = find_model(path)
    model, params = load_run(path, dtype=dtype) if kind is Kind.RUN else load_hf(folder)
    model = build(model.config, dtype=jnp.dtype(dtype))
    tokenizer = load_tokenizer(folder)
    ids = special_ids(folder) if kind is Kind.HUGGING_FACE else SpecialIds(bos=tokenizer.eos_id)  # text follows an end
    begin = () if ids.bos is None else (ids.bos,)
    if kind is Kind.HUGGING_FACE and begin:  # Qwen's directories declare a begin token and do not add it
        settings = folder / "tokenizer_config.json"
        declared = read_json(settings).get("add_bos_token") if settings.is_file() else None
        begin = begin if tokenizer.begins_with(*begin, add_bos_token=declared) else ()
    pad_id = tokenizer.pad_id if ids.pad is None else ids.pad
    return TextModel(model, params, tokenizer, begin, ids.eos or (tokenizer.eos_id,), pad_id)
