"""Run folders to Hugging Face directories and back: what `scripts/convert_hf.py` does.

A conversion that fails leaves nothing in its target.
"""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxllm.config import DataConfig, RunConfig, TrainingConfig
from jaxllm.config.file import dump_config
from jaxllm.data.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer, tokenizers_in
from jaxllm.interop.hf import SpecialIds, load_hf, save_hf
from jaxllm.interop.safetensors_dir import INDEX, SINGLE
from jaxllm.models import build
from jaxllm.run.start import read_run
from jaxllm.storage.checkpoint import save_params
from jaxllm.storage.folder import CHECKPOINTS, CONFIG, HUGGING_FACE_CONFIG, find_model

_log = logging.getLogger(__name__)


def export_run(source: str | Path, target: str | Path, *, dtype: Any = None) -> None:
    """Writes parameters of RUN (its newest) or RUN@STEP, tokenizer and special ids as a Hugging Face directory.

    FileExistsError when the target holds what would be overwritten, as `check_target`.
    """
    target = Path(target).expanduser()
    check_target(target)
    config, params = read_run(source)
    files = tokenizers_in(find_model(source)[0])
    ids = None
    if files:
        tokenizer = load_tokenizer(files[0])
        begins = None if config.model.encoder_decoder else tokenizer.eos_id  # a document follows an end token
        ids = SpecialIds(bos=begins, eos=(tokenizer.eos_id,), pad=tokenizer.pad_id)
    with _moved_when_whole(target) as folder:
        save_hf(folder, build(config.model), params, dtype=dtype, special_ids=ids)
        for file in files:
            shutil.copy(file, folder)
            if file.suffix == ".json":
                (folder / "tokenizer_config.json").write_text(_tokenizer_config(config, tokenizer), encoding="utf-8")
            elif isinstance(tokenizer, SentencePieceTokenizer) and not config.model.encoder_decoder:
                begins = {"add_bos_token": True, "bos_token": tokenizer.piece(tokenizer.eos_id)}
                (folder / "tokenizer_config.json").write_text(json.dumps(begins, indent=2) + "\n", encoding="utf-8")
            if config.model.encoder_decoder and file.suffix == ".model":
                # transformers 4.x looks for T5's by this name alone, 5.x for UMT5's by the general one.
                shutil.copy(file, folder / "spiece.model")


def _tokenizer_config(config: RunConfig, tokenizer: Tokenizer) -> str:
    """What transformers needs next to tokenizer.json: the special tokens, and the longest text."""
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    end = tokenizer.decode([tokenizer.eos_id])
    begins = {} if config.model.encoder_decoder else {"bos_token": end, "add_bos_token": True}
    special = {"eos_token": end, "pad_token": tokenizer.decode([tokenizer.pad_id])}
    longest = {} if config.model.context is None else {"model_max_length": config.model.context}
    return json.dumps(settings | begins | special | longest, indent=2) + "\n"


def import_run(source: str | Path, target: str | Path) -> None:
    """Writes a run folder of float32 parameters and tokenizer alone, for `training.init_from` and for generation.

    FileExistsError when the target holds what would be overwritten, as `check_target`.
    """
    source, folder = Path(source).expanduser(), Path(target).expanduser()
    check_target(folder)
    model, params = load_hf(source, dtype="float32")
    kept = {file.name.replace("spiece", "tokenizer"): file for file in tokenizers_in(source)}
    if not kept:
        _log.warning("%s has no tokenizer; put its tokenizer.json or .model into %s before its use", source, folder)
    longest, objective = min(256, model.config.context or 256), model.config.objectives[0]
    tokenizer = str(folder / next(iter(kept))) if kept else "train"
    data = DataConfig(tokenizer=tokenizer, objective=objective, sequence_length=longest)
    config = RunConfig(model=model.config, data=data, training=TrainingConfig(run_dir=str(folder)))
    with _moved_when_whole(folder) as partial:
        save_params(partial / CHECKPOINTS, params)
        for name, file in kept.items():
            shutil.copy(file, partial / name)
        (partial / CONFIG).write_text(dump_config(config), encoding="utf-8")


@contextlib.contextmanager
def _moved_when_whole(folder: Path) -> Iterator[Path]:
    """A folder inside `folder`, whose contents move up into `folder` once they are whole."""
    partial = folder / "convert.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
    partial.mkdir(parents=True)
    moved: list[Path] = []
    try:
        yield partial
        for item in list(partial.iterdir()):
            moved.append(folder / item.name)
            item.replace(moved[-1])
    except BaseException:
        for item in moved:
            shutil.rmtree(item) if item.is_dir() else item.unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(target: str | Path) -> None:
    """Refuses to convert into a folder that holds a model or a tokenizer.

    Raises:
        FileExistsError: naming what is there.
    """
    folder = Path(target).expanduser()
    held = [file.name for file in tokenizers_in(folder)] + [n for n in (SINGLE, INDEX) if (folder / n).exists()]
    reasons = {
        "is a file": folder.exists() and not folder.is_dir(),
        "already holds a run": (folder / CHECKPOINTS).exists() or (folder / CONFIG).exists(),
        "is a Hugging Face directory": (folder / HUGGING_FACE_CONFIG).exists(),
        f"already holds {', '.join(held)}": bool(held),
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        raise FileExistsError(f"{folder} {reason}; choose another folder")
