"""YAML <-> `RunConfig`: one file is one run; overrides `key.path=value` follow it.

This module handles keys, retired settings and numbers that YAML reads as text. The classes of `jaxllm.config` check
the values (`jaxllm.config.setting`).
"""

import contextlib
import copy
import dataclasses
import difflib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml

from jaxllm.config.model import MODEL_CONFIGS
from jaxllm.config.run import RunConfig
from jaxllm.config.setting import SettingError, nearest, settings_of, type_name

# Settings that no longer exist, as section.key, with their old defaults. The config.yaml of an older run holds all
# settings of its time: a retired one is dropped at its default, another value is an error.
RETIRED: dict[str, Any] = {"precision.retries": 0}
# The configs that come with jaxllm by name: a clone has them next to this package, a wheel puts them inside.
_SHIPPED = {file.stem: file for up in (2, 1) for file in sorted(Path(__file__).parents[up].glob("configs/*.yaml"))}


class ConfigError(ValueError):
    """A wrong setting; the message names it and the fix."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run from YAML, or a config of jaxllm by its name, and applies overrides such as `training.steps=100`.

    Raises:
        ConfigError: naming the key, what was found, and what to write instead.
    """
    path = Path(path) if Path(path).is_file() else _SHIPPED.get(str(path), Path(path))
    if not path.is_file():
        raise ConfigError(f"no config file {path}, nor a config of jaxllm by that name{nearest(path.stem, _SHIPPED)}")
    try:
        text = path.read_text(encoding="utf-8")
        _check_keys(yaml.compose(text, Loader=yaml.SafeLoader), path)
        raw = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error}); is it a config?") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested without end: does an alias refer to the anchor that it is in?") from None
    except ValueError as error:  # of a value that has the form of a number or a date
        raise ConfigError(f"{path} has a value that YAML cannot read: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold sections such as `model:`, got {type(raw).__name__}")
    for override in overrides:
        _apply(raw, override)
    return parse_config(raw, where=str(path))


def parse_config(raw: dict[str, Any], *, where: str = "config") -> RunConfig:
    """Builds a `RunConfig` from nested dicts; see `load_config` for the errors."""
    try:
        return _run_of(_without_retired(raw))
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def with_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The run with settings such as `training.steps=100` changed; see `load_config` for the errors."""
    if not overrides:
        return config
    raw = yaml.safe_load(dump_config(config))
    for override in overrides:
        _apply(raw, override)
    return parse_config(raw)


def dump_config(config: RunConfig) -> str:
    """The resolved config as YAML; reading it back gives an equal object."""
    raw = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)


def config_differences(old: Any, new: Any, *, ignored: Collection[str] = (), prefix: str = "") -> list[str]:
    """Keys whose values differ between two configs, or two sections of them, as `key.path: old -> new`.

    The keys in `ignored` and those below them may differ. `prefix` is that of a section's keys, such as "model.".
    """
    left, right = (_flatten(dataclasses.asdict(config), prefix) for config in (old, new))
    absent = "(absent)"
    pairs = {key: (left.get(key, absent), right.get(key, absent)) for key in [*left, *right]}
    return [
        f"{key}: {before} -> {after}"
        for key, (before, after) in pairs.items()
        if before != after and not any(f"{key}.".startswith(f"{name}.") for name in ignored)
    ]


def describe_keys() -> dict[str, list[tuple[str, str, str, str]]]:
    """All settings as (key, type, default, meaning), by what they are settings of: a family's model, or any run."""
    rows = {f"model of family {family}": _describe(cls, "model.") for family, cls in MODEL_CONFIGS.items()}
    rows["run"] = []
    for section, item in settings_of(RunConfig).items():
        rows["run"].extend(_describe(item.kind, f"{section}.") if section != "model" else [])
    return rows


def _without_retired(raw: dict[str, Any]) -> dict[str, Any]:
    """The settings without those in `RETIRED`; raises ConfigError for one that is not at its old default."""
    kept = copy.deepcopy(raw)
    for name, default in RETIRED.items():
        section, key = name.split(".")
        settings = kept.get(section)
        value = settings.pop(key, default) if isinstance(settings, dict) else default
        if value != default:
            only = f"{_yaml_word(default)} is the only value that is still accepted, got {value!r}"
            raise ConfigError(f"{name} no longer exists; {only}; remove the key, or use an earlier jaxllm")
    return kept


def _check_keys(node: Any, path: Path) -> None:
    """Refuses a key that occurs twice in a section: YAML silently keeps the last."""
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
    rows = []
    for name, item in settings_of(cls).items():
        if hasattr(item.kind, "__dataclass_fields__"):
            rows.extend(_describe(item.kind, f"{prefix}{name}."))
            continue
        default = "required" if item.default is dataclasses.MISSING else _yaml_word(item.default)
        rows.append((f"{prefix}{name}", type_name(item.kind), default, f"{item.meaning}."))
    return rows


def _yaml_word(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "[]" if value == () else str(value) or '""'


def _run_of(raw: dict[str, Any]) -> RunConfig:
    kinds = {name: item.kind for name, item in settings_of(RunConfig).items()}
    for name in raw:
        if name not in kinds:
            raise ConfigError(f"unknown section {name!r}{nearest(str(name), kinds)}")
    if "model" not in raw:
        families = " or ".join(f"`family: {name}`" for name in MODEL_CONFIGS)
        raise ConfigError(f"no model section; start it with {families}")
    kinds["model"] = _model_kind(raw["model"])
    return RunConfig(**{name: _parse(kinds[name], value, (name,)) for name, value in raw.items()})


def _model_kind(raw: Any) -> type:
    if not isinstance(raw, dict | None):
        raise ConfigError(f"model must hold settings such as `family: llama`, got {raw!r}")
    family = (raw or {}).get("family")
    if str(family) not in MODEL_CONFIGS:
        raise ConfigError(f"model.family must be one of {', '.join(map(repr, MODEL_CONFIGS))}, got {family!r}")
    return MODEL_CONFIGS[str(family)]


def _parse(kind: Any, value: Any, path: tuple[str, ...]) -> Any:
    """A value of the file, ready to be checked: a dict becomes a class of settings, and text a number."""
    if not hasattr(kind, "__dataclass_fields__"):
        if isinstance(value, dict):
            return {name: _number(kind, item) for name, item in value.items()}
        return [_number(kind, item) for item in value] if isinstance(value, list) else _number(kind, value)
    key, declared, raw = ".".join(path), settings_of(kind), {} if value is None else value
    if not isinstance(raw, dict):
        raise ConfigError(f"{key} must hold settings, one `name: value` per line, got {raw!r}")
    _check_names(kind, raw, path)
    values = {name: _parse(declared[name].kind, item, (*path, name)) for name, item in raw.items()}
    try:
        return kind(**values)
    except SettingError as error:
        raise ConfigError("; ".join(f"{key}.{name} {problem}" for name, problem in error.problems.items())) from None
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None


def _check_names(kind: type, raw: dict[str, Any], path: tuple[str, ...]) -> None:
    prefix, declared = f"{'.'.join(path)}.", settings_of(kind)
    needed = [name for name, item in declared.items() if item.default is dataclasses.MISSING]
    wrong = [_unknown_key(f"{prefix}{name}", kind, prefix) for name in raw if name not in declared]
    wrong += [f"{prefix}{name} is required and missing" for name in needed if name not in raw]
    if wrong:
        raise ConfigError("; ".join(wrong))


def _unknown_key(key: str, kind: type, prefix: str) -> str:
    """The error about a key: the nearest one of its section, else of another section, else all of its section."""
    own, name = [row[0] for row in _describe(kind, prefix)], key.removeprefix(prefix)
    owners = {owner: [row[0] for row in rows] for owner, rows in describe_keys().items()}
    other = next((owner for owner, keys in owners.items() if key in keys), None)
    if other is not None:
        return f"{key} is a setting of a {other}; remove it, or choose that family"
    if close := difflib.get_close_matches(name, [each.removeprefix(prefix) for each in own], n=1, cutoff=0.5):
        return f"unknown key {key}; did you mean {prefix + close[0]!r}?"
    elsewhere = _elsewhere(name)
    return f"unknown key {key}{elsewhere}" if elsewhere else f"unknown key {key}; known: {', '.join(own)}"


def _elsewhere(name: str) -> str:
    """The end of an error about a name: the keys of any section that are nearest to it, or nothing."""
    by_name: dict[str, list[str]] = {}
    for key in dict.fromkeys(row[0] for rows in describe_keys().values() for row in rows):
        by_name.setdefault(key.rpartition(".")[2], []).append(key)
    close = difflib.get_close_matches(name, by_name, n=1, cutoff=0.7)
    return f"; did you mean {' or '.join(map(repr, by_name[close[0]]))}?" if close else ""


def _number(kind: Any, value: Any) -> Any:
    """A number in its declared type: PyYAML reads 3e-4 (no point) as text, and 1.0e+3 as a float."""
    kinds = get_args(kind) or (kind,)
    if isinstance(value, str) and (int in kinds or float in kinds):
        with contextlib.suppress(ValueError):
            value = float(value)
    return int(value) if int in kinds and isinstance(value, float) and value.is_integer() else value


def _apply(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if override.startswith("-"):
        raise ConfigError(f"unknown {override}; write a setting without dashes, e.g. training.steps=100")
    if not separator or len(parts) < 2 or not all(parts):
        fix = _elsewhere(key.strip()) or ", e.g. training.steps=100"
        raise ConfigError(f"override {override!r} is not of the form section.key=value{fix}")
    node = raw
    for part in parts[:-1]:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {part!r} holds a value, not a section")
    try:
        node[parts[-1]] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        node[parts[-1]] = text


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
