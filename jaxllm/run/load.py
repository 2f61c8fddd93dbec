"""Models from disk: of a run folder, or with their tokenizer of a run folder or a Hugging Face directory."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxllm.config.file import ConfigError
from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.generation.text import TextModel
from jaxllm.interop.hf import load_hf, special_ids
from jaxllm.models import Model, build
from jaxllm.run.start import read_run
from jaxllm.storage.folder import Kind, kind_of


def load_run(folder: str | Path, *, dtype: str = "float32") -> tuple[Model, dict[str, Any]]:
    """Model and float32 parameters of a run's newest whole checkpoint, the counterpart of `load_hf` for a run folder.

    Args:
        folder: `training.run_dir` of the run.
        dtype: of the computation.

    Raises:
        ConfigError: when the folder is not a run folder.
        CheckpointError: when it has no readable checkpoint.

    Example:
        model, params = jaxllm.load_run("runs/llama_tiny")
        logits = model.apply({"params": params}, tokens)
    """
    config, params = read_run(folder)
    return build(config.model, dtype=jnp.dtype(dtype)), params


def load_text_model(path: str | Path, *, dtype: str = "float32", int8: bool = False) -> TextModel:
    """The model of a run folder (its newest checkpoint) or of a Hugging Face directory, with its tokenizer.

    Args:
        path: folder.
        dtype: of the computation.
        int8: store the matrices as int8.

    Raises:
        ConfigError: when the folder is neither a run folder nor a Hugging Face directory.
        CheckpointError, InteropError, DataError: when the files in it cannot be read.
    """
    folder = Path(path).expanduser()
    kind = kind_of(folder)
    if kind is None:
        raise ConfigError(f"{folder} is neither a run folder (config.yaml) nor a Hugging Face directory (config.json)")
    model, params = load_run(folder, dtype=dtype) if kind is Kind.RUN else load_hf(folder)
    model = build(model.config, dtype=jnp.dtype(dtype))
    text_model = TextModel.of(model, params, load_tokenizer(folder), int8=int8)
    if kind is Kind.RUN:
        return text_model
    ids = special_ids(folder)
    return text_model._replace(
        begin=() if ids.bos is None else (ids.bos,),
        eos_ids=ids.eos or text_model.eos_ids,
        pad_id=text_model.pad_id if ids.pad is None else ids.pad,
    )
