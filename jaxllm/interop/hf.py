"""Hugging Face directories to (model, parameters) and back, without torch or transformers.

A family is a module with `DEFAULTS`, `IGNORED`, `read_config`, `write_config` and `entries`, found by the model_type of
config.json. Out of scope: names of tensors and keys (the families), bytes (`safetensors_dir`), tokenizers.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.config import ModelConfig
from jaxllm.interop import InteropError, llama, t5, weight_dtype
from jaxllm.interop.safetensors_dir import TensorFiles, read_json, read_params, write_params
from jaxllm.models import Model, abstract_params, build, check_params

_FAMILIES: dict[str, ModuleType] = {"llama": llama, "t5": t5}  # by our family


class SpecialIds(NamedTuple):
    """Token ids that a directory declares.

    Attributes:
        bos: first token of a text, or None.
        eos: tokens that end a text; empty when none is declared.
        pad: padding, or None.
    """

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None


def load_hf(path: str | Path, *, dtype: Any = None) -> tuple[Model, dict[str, Any]]:
    """The model and parameters of a directory that transformers' `save_pretrained` wrote.

    Args:
        path: directory with config.json and safetensors files, one or sharded.
        dtype: of the parameters and of the model's activations: float32, bfloat16 or float16; None takes the narrowest
            that holds every tensor of the files exactly.

    Raises:
        InteropError: for an unknown model, a setting that cannot be reproduced, or tensors that do not fit.
    """
    dtype = None if dtype is None else weight_dtype(dtype)
    config, files = _open(path)
    module = _FAMILIES[config.family]
    shapes = abstract_params(build(config))
    params = read_params(files, module.entries(config), shapes, dtype=dtype, ignored=module.IGNORED)
    return build(config, dtype=jnp.result_type(*jax.tree.leaves(params))), params


def load_hf_config(path: str | Path) -> ModelConfig:
    """The model config of a directory; as `load_hf`, without reading the weights."""
    return _open(path)[0]


def save_hf(
    path: str | Path,
    model: Model,
    params: Any,
    *,
    dtype: Any = None,
    special_ids: SpecialIds | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a directory that transformers 4.x and 5.x open, and `load_hf` reads back bit for bit.

    Args:
        path: the directory; weights and ids of an earlier export there are replaced.
        model: as `build` or `load_hf` made it.
        params: its parameters, stacked over layers as in training.
        dtype: of the tensors; None keeps each parameter's.
        special_ids: begin, end and padding ids for config.json and generation_config.json; None declares none.
        shard_bytes: most bytes of tensors in a file.

    Raises:
        InteropError: when no architecture of transformers has these settings, or the parameters are another model's.
    """
    module = _FAMILIES.get(model.config.family)
    if module is None:
        raise InteropError(f"family {model.config.family!r} has no Hugging Face form; {', '.join(_FAMILIES)} have one")
    raw = module.write_config(model.config)
    dtype = None if dtype is None else weight_dtype(dtype)
    try:
        check_params(model, params)
    except ValueError as error:
        raise InteropError(str(error)) from None
    kinds = [jnp.dtype(leaf.dtype) for leaf in jax.tree.leaves(params)] if dtype is None else [dtype]
    kind = jnp.result_type(*kinds).name
    ids = _special_keys(special_ids or SpecialIds())
    # 4.x reads torch_dtype, 5.x prefers dtype. Absent ids would become the architecture's defaults.
    raw |= {"dtype": kind, "torch_dtype": kind, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | ids
    folder = Path(path).expanduser()
    if folder.exists() and not folder.is_dir():
        raise InteropError(f"{folder} is a file; give a directory to write")
    configs = {"config.json": raw}
    if ids:
        start = {key: raw[key] for key in ("decoder_start_token_id",) if key in raw}
        configs["generation_config.json"] = ids | start
    texts = {name: json.dumps(value, indent=2) + "\n" for name, value in configs.items()}
    write_params(folder, module.entries(model.config), params, dtype=dtype, shard_bytes=shard_bytes, texts=texts)
    if not ids:  # those of an earlier export would take precedence over the nulls of config.json
        (folder / "generation_config.json").unlink(missing_ok=True)


def special_ids(path: str | Path) -> SpecialIds:
    """Begin, end and padding ids of a directory: generation_config.json, then config.json, then the defaults.

    Raises:
        InteropError: when one of the files is not a JSON object, or an id in it is not an integer.
    """
    folder = Path(path).expanduser()
    _, raw = _settings(folder)
    path = folder / "generation_config.json"
    if path.is_file():
        given = {key: value for key, value in read_json(path).items() if value is not None}
        try:
            _check_kinds(given, dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")))
        except InteropError as error:
            raise InteropError(f"{path}: {error}") from None
        raw |= given
    eos = raw.get("eos_token_id")
    ends: Sequence[int] = () if eos is None else [eos] if isinstance(eos, int) else eos
    return SpecialIds(raw.get("bos_token_id"), tuple(ends), raw.get("pad_token_id"))


def _open(path: str | Path) -> tuple[ModelConfig, TensorFiles]:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise InteropError(f"{folder} is not a directory; give one that save_pretrained wrote (nothing is downloaded)")
    module, settings = _settings(folder)
    files = TensorFiles(folder)
    try:
        _check_kinds(settings, module.DEFAULTS[settings["model_type"]])
        if settings.get("quantization_config"):
            raise InteropError("quantization_config is set; only unquantised weights are read")
        return module.read_config(settings, files), files
    except InteropError as error:
        raise InteropError(f"{folder / 'config.json'}: {error}") from None
    except ValueError as error:  # of our config's own invariants
        raise InteropError(f"{folder / 'config.json'} cannot be a model here: {error}") from None


def _settings(folder: Path) -> tuple[ModuleType, dict[str, Any]]:
    """The family of a directory, and its config.json over the defaults of the architecture."""
    raw = read_json(folder / "config.json")
    kind = raw.get("model_type")
    for module in _FAMILIES.values():
        if isinstance(kind, str) and kind in module.DEFAULTS:
            return module, module.DEFAULTS[kind] | raw
    known = ", ".join(name for module in _FAMILIES.values() for name in module.DEFAULTS)
    raise InteropError(f"{folder / 'config.json'} has model_type {kind!r}; known: {known}")


# Keys that may be null.
_NULLABLE = (
    *("num_key_value_heads", "head_dim", "num_decoder_layers", "sliding_window"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)


def _check_kinds(raw: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Refuses values of another type than their default; they would fail inside JAX."""
    for key, default in defaults.items():
        value = raw.get(key, default)
        kinds = (int, float) if isinstance(default, float) else (int if default is None else type(default),)
        nullable = default is None or isinstance(default, bool) or key in _NULLABLE
        listed = key == "eos_token_id" and isinstance(value, list) and all(type(item) is int for item in value)
        if type(value) not in kinds and not (value is None and nullable) and not listed:
            raise InteropError(f"{key} must be of type {kinds[-1].__name__}, got {value!r}")


def _special_keys(ids: SpecialIds) -> dict[str, Any]:
    eos = ids.eos[0] if len(ids.eos) == 1 else list(ids.eos) or None
    keys = {"bos_token_id": ids.bos, "eos_token_id": eos, "pad_token_id": ids.pad}
    return {key: value for key, value in keys.items() if value is not None}
