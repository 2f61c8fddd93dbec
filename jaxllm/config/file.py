"""YAML <-> `RunConfig`: one file is one run, with `key.path=value` overrides after it.

pydantic does the parsing and the type checks; the classes in `jaxllm.config` do the rest. pydantic and PyYAML are
imported when a file is read, so that models can be used where neither is installed.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import inspect
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxllm.config.model import MODEL_CONFIGS, RopeConfig
from jaxllm.config.run import RunConfig

# Settings that no longer exist, as section.key, with the default they had. The config.yaml of an older run holds all
# settings of its time: one of these at its default is dropped, another value is an error.
RETIRED: dict[str, Any] = {"precision.retries": 0}


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it and the fix."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run from YAML and applies overrides such as `training.steps=100`.

    Raises:
        ConfigError: naming the key, what was found, and what to write instead.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no config file {path}; the ones that come with jaxllm are in configs/")
    try:
        text = path.read_text(encoding="utf-8")
        _check_keys(yaml.compose(text, Loader=yaml.SafeLoader), path)
        raw = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error}); is it a config?") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested without end (an alias within its own anchor?); is it a config?") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold sections such as `model:`, got {type(raw).__name__}")
    for override in overrides:
        _apply(raw, override)
    return parse_config(raw, where=str(path))


def parse_config(raw: dict[str, Any], *, where: str = "config") -> RunConfig:
    """Builds a `RunConfig` from nested dicts; see `load_config` for the errors."""
    raw = _without_retired(raw, where)
    sections: dict[str, Any] = {}
    for name in raw:
        if name not in _section_types():
            raise ConfigError(f"{where}: unknown section {name!r}{_nearest(str(name), list(_section_types()))}")
    if "model" not in raw:
        raise ConfigError(
            f"{where}: no model section; start it with {' or '.join(f'`family: {name}`' for name in MODEL_CONFIGS)}"
        )
    for name, value in raw.items():
        sections[name] = _parse_section(name, value, where)
    try:
        return RunConfig(**sections)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def with_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The run with settings such as `training.steps=100` changed; see `load_config` for the errors."""
    if not overrides:
        return config
    import yaml

    raw = yaml.safe_load(dump_config(config))
    for override in overrides:
        _apply(raw, override)
    return parse_config(raw)


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML; reading it back gives an equal object."""
    import yaml

    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


def config_differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Keys whose values differ, as `key.path: old -> new`."""
    left, right = _flatten(dataclasses.asdict(old)), _flatten(dataclasses.asdict(new))
    missing = "(absent)"
    return [
        f"{key}: {left.get(key, missing)} -> {right.get(key, missing)}"
        for key in dict.fromkeys([*left, *right])
        if left.get(key, missing) != right.get(key, missing)
    ]


def describe_keys() -> list[tuple[str, str, str, str]]:
    """All settings as (key, type, default, meaning)."""
    rows = []
    for section, types in _section_types().items():
        for cls in types:
            prefix = section if len(types) == 1 else f"{section}({_family(cls)})"
            rows.extend(_describe(cls, prefix))
    return rows


def key_table() -> str:
    """All settings as text, for `--help`."""
    rows = (f"  {key} ({kind}, {default})\n      {meaning}" for key, kind, default, meaning in describe_keys())
    return "settings (type, default):\n" + "\n".join(rows)


def _without_retired(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The same settings without those in `RETIRED`; raises ConfigError for one that is not at its old default."""
    kept = copy.deepcopy(raw)
    for name, default in RETIRED.items():
        *path, key = name.split(".")
        node: Any = kept
        for part in path:
            node = node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, dict) or key not in node:
            continue
        value = node.pop(key)
        if value != default:
            raise ConfigError(
                f"{where}: {name} no longer exists; {_yaml_word(default)} is the only value that is still accepted, "
                f"got {value!r}; remove the key, or read this config with an earlier jaxllm"
            )
    return kept


def _check_keys(node: Any, path: Path) -> None:
    """Refuses a key that one section has twice: YAML silently keeps the last."""
    import yaml

    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in lines:
            raise ConfigError(f"{path} has the key {name} in line {lines[name]} and again in line {line}; keep one")
        lines[name] = line
        _check_keys(value, path)


def _describe(cls: type, prefix: str) -> list[tuple[str, str, str, str]]:
    # An attribute's meaning continues in the lines that are indented deeper than its name.
    found = re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)$", inspect.cleandoc(cls.__doc__ or ""), flags=re.M)
    meanings = {name: " ".join(text.split()) for name, text in found}
    rows = []
    for item in dataclasses.fields(cls):
        if item.name == "rope":
            rows.extend(_describe(RopeConfig, f"{prefix}.rope"))
            continue
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        value = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        default = "required" if required else _yaml_word(value)
        rows.append((f"{prefix}.{item.name}", _type_name(cls, item.name), default, meanings[item.name]))
    return rows


def _yaml_word(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "[]" if value == () else str(value) or '""'


def _type_name(cls: type, name: str) -> str:
    hint = typing.get_type_hints(cls)[name]
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(typing.get_args(hint))
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("None", "null").replace(" ", "")


def _family(cls: type) -> str:
    return str(next(item.default for item in dataclasses.fields(cls) if item.name == "family"))


def _section_types() -> dict[str, tuple[type, ...]]:
    hints = typing.get_type_hints(RunConfig)
    types = {item.name: (hints[item.name],) for item in dataclasses.fields(RunConfig)}
    return {**types, "model": tuple(MODEL_CONFIGS.values())}


@functools.cache
def _adapter(kind: type) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _kind_of(section: str, value: Any, where: str) -> type:
    """The class that a section becomes; a model's is named by its family."""
    if section != "model":
        return _section_types()[section][0]
    if not isinstance(value, dict | None):
        raise ConfigError(f"{where}: model must hold settings such as `family: llama`, got {value!r}")
    family = (value or {}).get("family")
    if str(family) not in MODEL_CONFIGS:
        known = ", ".join(map(repr, MODEL_CONFIGS))
        raise ConfigError(f"{where}: model.family must be one of {known}, got {family!r}")
    return MODEL_CONFIGS[str(family)]


def _parse_section(section: str, value: Any, where: str) -> Any:
    from pydantic import ValidationError

    if value is None:
        value = {}
    try:
        return _adapter(_kind_of(section, value, where)).validate_python(value)
    except ValidationError as error:
        lines = [_explain(section, item) for item in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from None


def _explain(section: str, item: Any) -> str:
    loc = [str(part) for part in item["loc"] if part not in MODEL_CONFIGS]
    key = ".".join([section, *loc])
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = [row[0].split(".", 1)[1] for row in describe_keys() if re.match(rf"{section}(\(\w+\))?\.", row[0])]
        return f"unknown key {key}{_nearest('.'.join(loc), known)}"
    if item["type"] in ("missing", "missing_argument"):
        return f"{key} is required and missing"
    if item["type"] == "value_error":
        return f"{section}: {item['ctx']['error']}"
    return f"{key}: {item['msg']}, got {item['input']!r}"


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(dict.fromkeys(known))}"


def _apply(raw: dict[str, Any], override: str) -> None:
    import yaml

    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or len(parts) < 2 or not all(parts):
        raise ConfigError(f"override {override!r} is not of the form section.key=value, e.g. training.steps=100")
    node = raw
    for part in parts[:-1]:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {part!r} holds a value, not a section")
    try:
        node[parts[-1]] = yaml.safe_load(text)
    except yaml.YAMLError:
        node[parts[-1]] = text


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
