"""Models from disk: of a run folder, or with their tokenizer of a run folder or a Hugging Face directory."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxllm.data.tokenizer import Tokenizer, load_tokenizer
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
    begins = kind is Kind.RUN or _begins_with(folder, tokenizer, ids.bos)
    begin = (ids.bos,) if begins and ids.bos is not None else ()
    pad_id = tokenizer.pad_id if ids.pad is None else ids.pad
    return TextModel(model, params, tokenizer, begin, ids.eos or (tokenizer.eos_id,), pad_id)


def _begins_with(folder: Path, tokenizer: Tokenizer, token: int | None) -> bool:
    """Whether the tokenizer of a Hugging Face directory puts this token before every text: Qwen's does not."""
    file = folder / "tokenizer_config.json"
    says = read_json(file).get("add_bos_token") if file.is_file() else None
    return says if isinstance(says, bool) else tokenizer.begins_with(token)
