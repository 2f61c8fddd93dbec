"""Models ready for text generation, from a run folder or a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp

from jaxllm.config.file import ConfigError
from jaxllm.data.tokenizer import Tokenizer, load_tokenizer, tokenizers_in
from jaxllm.generation.text import TextModel
from jaxllm.interop.hf import load_hf, special_ids
from jaxllm.models import build, decoder_of
from jaxllm.run.start import load_run


def load_text_model(path: str | Path, *, dtype: str = "float32", int8: bool = False) -> TextModel:
    """The newest model of a run folder, or that of a Hugging Face directory with its tokenizer.

    Args:
        path: folder.
        dtype: of the computation.
        int8: store the matrices as int8.

    Raises:
        ConfigError: when the folder is neither.
        CheckpointError, InteropError, DataError: when what is in it cannot be read.
    """
    folder = Path(path).expanduser()
    if (folder / "config.yaml").is_file():
        config, params = load_run(folder)
        model = build(config.model, dtype=jnp.dtype(dtype))
        tokenizer = _tokenizer(folder)
        begin, ends, pad = (tokenizer.eos_id,), (tokenizer.eos_id,), tokenizer.pad_id
    elif (folder / "config.json").is_file():
        loaded, params = load_hf(folder)
        model, tokenizer, ids = build(loaded.config, dtype=jnp.dtype(dtype)), _tokenizer(folder), special_ids(folder)
        begin, ends = () if ids.bos is None else (ids.bos,), ids.eos or (tokenizer.eos_id,)
        pad = tokenizer.pad_id if ids.pad is None else ids.pad
    else:
        raise ConfigError(f"{folder} is neither a run folder (config.yaml) nor a Hugging Face directory (config.json)")
    return TextModel(model, decoder_of(model).prepare(params, int8=int8), tokenizer, begin, ends, pad)


def _tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(next(iter(tokenizers_in(folder)), folder / "tokenizer.json"))
