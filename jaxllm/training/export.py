"""Run folders to Hugging Face directories and back: what `scripts/convert_hf.py` does.

Not here: reading a run's parameters (`initial_params`), names of tensors (`jaxllm.interop`).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from jaxllm.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from jaxllm.config_file import dump_config
from jaxllm.data.tokenizer import load_tokenizer
from jaxllm.interop.hf import SpecialIds, load_hf, save_hf
from jaxllm.interop.safetensors_dir import INDEX, SINGLE
from jaxllm.models import build
from jaxllm.training.initial_params import load_run

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model")


def export_run(source: str | Path, target: str | Path, *, dtype: Any = None) -> None:
    """Writes a run's newest parameters, tokenizer and special ids as a Hugging Face directory.

    Raises:
        FileExistsError: when the target holds what would be overwritten, as `check_target`.
    """
    check_target(target)
    config, params = load_run(source)
    files = _tokenizer_files(Path(source))
    ids = None
    if files:
        tokenizer = load_tokenizer(files[0])
        begins = tokenizer.eos_id if config.model.family == "llama" else None  # a document follows an end token
        ids = SpecialIds(bos=begins, eos=(tokenizer.eos_id,), pad=tokenizer.pad_id)
    save_hf(target, build(config.model), params, dtype=dtype, special_ids=ids)
    for file in files:
        shutil.copy(file, target)


def import_run(source: str | Path, target: str | Path) -> None:
    """Writes a run folder of parameters alone, float32, for `training.init_from` and for generation.

    Raises:
        FileExistsError: when the target holds what would be overwritten, as `check_target`.
    """
    folder = Path(target)
    check_target(folder)
    model, params = load_hf(source, dtype="float32")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        writer.save((folder / "checkpoints" / "0" / "state").absolute(), args=ocp.args.PyTreeSave({"params": params}))
    (folder / "config.yaml").write_text(dump_config(_run_config(model.config, folder)), encoding="utf-8")
    for file in _tokenizer_files(Path(source)):
        shutil.copy(file, folder)


def check_target(target: str | Path) -> None:
    """Refuses a folder to convert into that holds a model: it would be lost, or the folder would be two things.

    Raises:
        FileExistsError: naming what is there.
    """
    folder = Path(target)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; choose another folder")
    if (folder / "checkpoints").exists() or (folder / "config.yaml").exists():
        raise FileExistsError(f"{folder} already holds a run; choose another folder")
    if (folder / "config.json").exists():
        raise FileExistsError(f"{folder} is a Hugging Face directory; choose another folder")
    others = [name for name in (*_TOKENIZERS, SINGLE, INDEX) if (folder / name).exists()]
    if others:
        raise FileExistsError(f"{folder} already holds {', '.join(others)}; choose another folder")


def _run_config(model: ModelConfig, folder: Path) -> RunConfig:
    if model.family == "llama":
        data = DataConfig(sequence_length=min(256, model.max_length))
    else:
        data = DataConfig(objective="span_corruption")
    return RunConfig(model=model, data=data, training=TrainingConfig(run_dir=str(folder)))


def _tokenizer_files(folder: Path) -> list[Path]:
    return [folder / name for name in _TOKENIZERS if (folder / name).is_file()]
