"""Configs: what is refused and with which words, overrides, and the round trip."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import functools
import math
from pathlib import Path
from typing import Annotated, Any

import hypothesis
import numpy as np
import pytest
import yaml
from hypothesis import strategies as st

from jaxllm import config as config_module
from jaxllm.config import LlamaConfig, RopeConfig, RunConfig, T5Config
from jaxllm.config import file as config_file
from jaxllm.config.file import (
    ConfigError,
    config_differences,
    describe_keys,
    dump_config,
    load_config,
    parse_config,
)
from jaxllm.config.setting import SettingError, at_least, at_most, settings, settings_of
from jaxllm.models import abstract_params, build, count_params

CONFIGS = sorted((Path(__file__).parent.parent.parent / "configs").glob("*.yaml"))
SMALL = {
    "model": {
        "family": "llama",
        "vocab_size": 512,
        "d_model": 64,
        "d_ff": 96,
        "num_layers": 2,
        "num_heads": 4,
    }
}


def parse(**sections: dict) -> RunConfig:
    return parse_config({**SMALL, **sections})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_load_reload_and_say_what_they_are(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config
    header = path.read_text().split("\nmodel:")[0]
    assert all(word in header for word in ("Purpose:", "Command:", "Size:", "Expect:"))


# Published sizes of the real shapes.
SIZES = {
    "llama_125m": 134_105_856,
    "llama3_1b": 1_235_814_400,
    "llama3_8b": 8_030_261_248,
    "llama3_8b_80gb": 8_030_261_248,
}


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_of_real_shapes(name: str) -> None:
    config = load_config(next(path for path in CONFIGS if path.stem == name))
    assert count_params(build(config.model)) == SIZES[name]


@pytest.mark.parametrize("text", ["3e-4", "0.0003", "3E-4"])
def test_floats_as_people_write_them(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(dump_config(parse()).replace("learning_rate: 0.0003", f"learning_rate: {text}"))
    assert load_config(path).optimizer.learning_rate == 3e-4
    assert load_config(path, [f"optimizer.learning_rate={text}"]).optimizer.learning_rate == 3e-4
    assert load_config(path, [f"optimizer.rate_factors.embed={text}"]).optimizer.rate_factors == {"embed": 3e-4}


def test_overrides_come_last_and_reach_nested_keys(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(dump_config(parse()))
    config = load_config(path, ["model.rope.theta=5e5", "training.steps=7", "data.text_key=body"])
    assert (config.model.rope.theta, config.training.steps, config.data.text_key) == (5e5, 7, "body")
    assert config_differences(load_config(path), config) == [
        "model.rope.theta: 10000.0 -> 500000.0",
        "data.text_key: text -> body",
        "training.steps: 1000 -> 7",
    ]


BAD = [
    ({"model": {**SMALL["model"], "num_head": 4}}, "did you mean 'model.num_heads'"),
    ({"model": {**SMALL["model"], "rope": {"thet": 1}}}, "did you mean 'model.rope.theta'"),
    ({"trainig": {"steps": 3}}, "did you mean 'training'"),
    ({"training": {"lerning_rate": 1}}, "training.lerning_rate; did you mean 'optimizer.learning_rate'?"),
    ({"model": {**SMALL["model"], "gated": True}}, "model.gated is a setting of a model of family t5; remove it"),
    ({"training": {"rainbow": 1}}, "unknown key training.rainbow; known: training.run_dir, training.steps"),
    ({"model": {**SMALL["model"], "num_kv_heads": 3}}, "num_heads 4 is not a multiple of num_kv_heads 3"),
    ({"model": {**SMALL["model"], "head_dim": 15}}, "head_dim must be even"),
    ({"model": {**SMALL["model"], "d_model": 65}}, "d_model 65 is not a multiple of num_heads 4"),
    ({"model": {**SMALL["model"], "family": "gpt"}}, "'llama', 't5'"),
    ({"model": {"family": "llama"}}, "model.vocab_size is required"),
    (
        {"model": {**SMALL["model"], "max_length": 128}},
        "data.sequence_length 256 exceeds model.max_length 128",
    ),
    ({"model": {**SMALL["model"], "rope": {"type": "linear"}}}, "needs factor"),
    ({"precision": {"compute": "float16"}}, "precision.loss_scale: dynamic"),
    ({"precision": {"islands": {"rope": "bfloat16"}}}, "islands.rope must be float32"),
    ({"precision": {"islands": {"mlp_output": "float32"}}}, "model.family 'llama' has no such island: mlp_output"),
    ({"optimizer": {"rate_factors": {"embed": None}}}, "rate_factors of 'embed' must be of type float, got None"),
    ({"optimizer": {"rate_factors": {"embed": math.nan}}}, "rate_factors of 'embed' must be finite, got nan"),
    ({"precision": {"islands": {"soft": "float32"}}}, "precision.islands must be one of norms, softmax, "),
    (
        {"model": {**SMALL["model"], "attention": "chunked"}, "precision": {"islands": {"softmax": "bfloat16"}}},
        "model.attention 'chunked' computes its softmax in float32",
    ),
    ({"precision": {"retries": 2}}, "precision.retries no longer exists; 0 is the only value"),
    ({"data": {"sequence_length": 1}}, "sequence_length must be at least 2, got 1"),
    ({"data": {"source": "files"}}, "source: files needs path"),
    ({"data": {"source": "wikitext", "path": "texts"}}, "(data.path=null); got source 'wikitext' and path 'texts'"),
    (
        {"model": {**SMALL["model"], "family": "t5", "num_kv_heads": 2}},
        "num_kv_heads is a setting of a model of family",
    ),
    ({"data": {"objective": "span_corruption"}}, "does not fit model.family 'llama'"),
    ({"data": {"objective": "prefix_lm"}}, "a decoder's attention is causal over the whole row"),
    ({"training": {"batch_size": 6, "accumulation": 4}}, "not a multiple of accumulation"),
    ({"training": {"steps": "many"}}, "training.steps"),
    ({"training": {"batch_size": 2**40}}, "lower it or raise training.accumulation"),
    ({"optimizer": {"schedule": "wsd"}}, "needs optimizer.decay_steps"),
    ({"optimizer": {"learning_rate": float("inf")}}, "learning_rate"),
]


@pytest.mark.parametrize(("sections", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_values_are_refused_with_the_fix(sections: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(**sections)
    assert message in str(error.value)


@pytest.mark.parametrize("override", ["steps=3", "training.steps", "model.vocab_size.x=3", "=3"])
def test_bad_overrides_are_refused(override: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(dump_config(parse()))
    with pytest.raises(ConfigError, match="override"):
        load_config(path, [override])


def test_an_override_without_its_section_is_refused_with_the_section(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(dump_config(parse()))
    with pytest.raises(ConfigError, match=r"section\.key=value; did you mean 'optimizer\.learning_rate'\?"):
        load_config(path, ["learning_rate=1e-3"])


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config file"):
        load_config(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: [unclosed")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(broken)
    broken.write_text("1: {steps: 3}")
    with pytest.raises(ConfigError, match="unknown section 1; known: model"):
        load_config(broken)
    broken.write_text("model:\n  family: t5\n  d_ff: 8\n\n  d_ff: 9\n")
    with pytest.raises(ConfigError, match=r"broken.yaml has the key d_ff in line 3 and again in line 5; keep one"):
        load_config(broken)
    broken.write_text("model: {family: t5}\ndata: {}\nmodel: {family: llama}\n")
    with pytest.raises(ConfigError, match=r"has the key model in line 1 and again in line 3"):
        load_config(broken)
    broken.write_text("model: &a {family: t5, rope: *a}")
    with pytest.raises(ConfigError, match=r"broken.yaml is nested without end"):
        load_config(broken)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"binary.yaml is not UTF-8 text"):
        load_config(tmp_path / "binary.yaml")


def all_keys() -> list[tuple[str, str, str, str]]:
    return [row for rows in describe_keys().values() for row in rows]


def test_every_key_is_described_and_there_are_few() -> None:
    rows = all_keys()
    assert all(meaning for *_, meaning in rows)
    assert len(rows) <= 140


@pytest.mark.parametrize("name", ["PrecisionConfig", "OptimizerConfig", "DataConfig", "TrainingConfig", "T5Config"])
def test_a_setting_is_described_to_the_end_of_its_docstring(name: str) -> None:
    section = name.removesuffix("Config").lower()
    owned = describe_keys()["model of family t5"] if section == "t5" else all_keys()
    rows = [(key.rpartition(".")[2], meaning) for key, *_, meaning in owned if section in ("t5", key.split(".")[0])]
    written = (getattr(config_module, name).__doc__ or "").partition("Attributes:")[2]
    assert written.split() == " ".join(f"{key}: {meaning}" for key, meaning in rows).split()


def test_direct_construction_is_checked_too() -> None:
    with pytest.raises(ValueError, match="relative_max_distance"):
        T5Config(vocab_size=8, d_model=8, d_ff=8, num_layers=1, num_heads=1, relative_max_distance=16)
    with pytest.raises(ValueError, match=r"RopeConfig\.type must be one of default, linear,"):
        RopeConfig(type="spiral")
    config = LlamaConfig(vocab_size=8, d_model=8, d_ff=8, num_layers=1, num_heads=2)
    assert (config.num_kv_heads, config.head_dim) == (2, 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_ff = 3


def test_abstract_parameters_allocate_nothing() -> None:
    config = load_config(next(path for path in CONFIGS if path.stem == "llama3_8b"))
    leaf = abstract_params(build(config.model))["embed"]
    assert type(leaf).__name__ == "ShapeDtypeStruct"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("activation", "swish", "activation must be one of silu, gelu_tanh, gelu, relu, got 'swish'"),
        ("layers", "unrolled", "layers must be one of scan, unroll"),
        ("attention", "flash", "attention must be one of auto, reference, chunked, cudnn"),
        ("d_model", 32.0, "d_model must be of type int, got 32.0"),
        ("d_model", "32", "d_model must be of type int, got '32'"),
        ("tie_embeddings", 1, "tie_embeddings must be of type bool, got 1"),
        ("num_layers", True, "num_layers must be of type int, got True"),
        ("sliding_window", 4.5, r"sliding_window must be of type int\|null, got 4.5"),
        ("rope", {"type": "default"}, "rope must be of type RopeConfig, got {"),
    ],
)
def test_a_config_made_in_python_is_checked_as_one_from_a_file(
    tiny: LlamaConfig, field: str, value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny, **{field: value})


def test_numbers_of_numpy_are_numbers(tiny: LlamaConfig) -> None:
    changed: dict[str, Any] = {"d_model": np.int64(tiny.d_model), "norm_eps": np.float32(1e-5)}
    assert dataclasses.replace(tiny, **changed).head_dim == tiny.head_dim


def test_numbers_become_those_of_the_declaration(tiny: LlamaConfig) -> None:
    """A NumPy float32 in a model would promote bfloat16 activations."""
    given_: dict[str, Any] = {"d_model": np.int64(tiny.d_model), "norm_eps": np.float32(0.5), "init_std": 1}
    changed = dataclasses.replace(tiny, **given_)
    assert [type(value) for value in (changed.d_model, changed.norm_eps, changed.init_std)] == [int, float, float]
    listed: dict[str, Any] = {"short_factor": [1, 2], "long_factor": [1.0, 2.0]}
    assert hash(RopeConfig(type="longrope", **listed)) == hash(
        RopeConfig(type="longrope", short_factor=(1.0, 2.0), long_factor=(1.0, 2.0))
    )


@pytest.mark.parametrize(
    ("section", "name", "value", "problem"),
    [
        ("training", "steps", 0, "must be at least 1, got 0"),
        ("training", "steps", True, "must be of type int, got True"),
        ("training", "run_dir", 5, "must be of type str, got 5"),
        ("training", "init_from", 5, r"must be of type str\|null, got 5"),
        ("optimizer", "eps", 0.0, "must be above 0, got 0.0"),
        ("optimizer", "eps", float("nan"), "must be finite, got nan"),
        ("optimizer", "eps", 10**400, "int too large to convert to float"),
        ("optimizer", "clip_norm", -1.0, "must be above 0 or null, got -1.0"),
        ("optimizer", "schedule", "cosin", "must be one of cosine, wsd, inverse_sqrt, constant, got 'cosin'"),
        ("optimizer", "schedule", ["wsd"], r"must be one of cosine, .*, got \['wsd'\]"),
        ("precision", "islands", {"softmax": "int8"}, "of 'softmax' must be one of float32, .*, got 'int8'"),
        ("precision", "islands", ["softmax"], r"must be of type \{norms\|.*\}, got \['softmax'\]"),
        ("data", "validation_fraction", 0.6, "must be above 0 and at most 0.5, got 0.6"),
    ],
)
def test_a_file_and_python_have_the_same_checker(section: str, name: str, value: Any, problem: str) -> None:
    cls = settings_of(RunConfig)[section].kind
    with pytest.raises(SettingError, match=rf"^{cls.__name__}\.{name} {problem}"):
        cls(**{name: value})
    with pytest.raises(ConfigError, match=rf"^config: {section}\.{name} {problem}"):
        parse(**{section: {name: value}})


def test_all_wrong_settings_of_a_section_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"training\.steps must be .*; training\.keep must be "):
        parse(training={"steps": "many", "keep": 0})
    with pytest.raises(
        ConfigError, match=r"unknown key training\.step; did you mean 'training\.steps'\?; unknown key training\."
    ):
        parse(training={"step": 1, "keeps": 0})


def test_a_declaration_is_all_that_a_setting_needs() -> None:
    @settings
    class Walk:
        """A walk."""

        steps: Annotated[int, at_least(1), at_most(9), "steps of the walk; 1 stays near"]
        plain: float = 2.0

        def __post_init__(self) -> None:
            if self.plain > self.steps:
                raise ValueError("plain exceeds steps")

    assert (Walk.__doc__ or "").split("\n") == [
        *("A walk.", "", "Attributes:", "    steps: steps of the walk; 1 stays near.", "    plain: .", "")
    ]
    assert Walk(steps=3) == Walk(plain=2, steps=3)
    with pytest.raises(SettingError, match="steps must be at least 1 and at most 9, got 10"):
        Walk(steps=10)
    with pytest.raises(ValueError, match="plain exceeds steps"):
        Walk(steps=1)


ODD = [None, True, 0, -1, 1, 2.5, 1e308, 10**400, float("inf"), float("nan"), "", "3e-4", "nan", "\0", "wsd", "files"]
ODD += [[], [1], ["x"], {}, {"a": 1}, {1: 2}, {"rope": "float16"}, (), datetime.date(2024, 1, 1), b"x", 2**62, "1e400"]


@functools.cache
def shipped(index: int) -> dict[str, Any]:
    return yaml.safe_load(dump_config(load_config(CONFIGS[index])))


@hypothesis.settings(max_examples=400, derandomize=True, deadline=None)
@hypothesis.given(st.integers(0, len(CONFIGS) - 1), st.data())
def test_any_value_anywhere_is_accepted_or_refused_by_name(index: int, data: st.DataObject) -> None:
    node = raw = copy.deepcopy(shipped(index))
    while True:
        key = data.draw(st.sampled_from([*node, "other"]))
        if not isinstance(node.get(key), dict) or not data.draw(st.integers(0, 4)):
            break
        node = node[key]
    node[key] = data.draw(st.sampled_from(ODD))
    try:
        config = parse_config(raw)
    except ConfigError as error:
        assert str(error).startswith("config: ") and (key in str(error) or key == "family")
    else:
        assert parse_config(yaml.safe_load(dump_config(config))) == config


TEXTS = [
    "2024-13-45",
    "*a",
    "&a [*a]",
    "!!python/object:os.system x",
    "[",
    "{",
    "1:70",
    "|",
    "9" * 5000,
    "=",
    "0x",
    "\t",
]


@hypothesis.settings(max_examples=200, derandomize=True, deadline=None)
@hypothesis.given(st.integers(0, len(CONFIGS) - 1), st.integers(0), st.sampled_from(TEXTS), st.booleans())
def test_any_text_in_a_file_is_accepted_or_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, index: int, where: int, text: str, whole: bool
) -> None:
    lines = CONFIGS[index].read_text(encoding="utf-8").splitlines()
    at = where % len(lines)
    lines[at] = text if whole else f"{lines[at].partition(':')[0]}: {text}"
    path = tmp_path_factory.getbasetemp() / "changed.yaml"
    path.write_text("\n".join(lines), encoding="utf-8")
    try:
        load_config(path)
    except ConfigError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("text", TEXTS)
def test_any_override_is_accepted_or_refused_by_name(text: str) -> None:
    try:
        load_config(CONFIGS[0], [f"training.run_dir={text}", f"training.steps={text}"])
    except ConfigError as error:
        assert "training.steps" in str(error) or "training.run_dir" in str(error)


OLD = [({"precision": {"retries_before": 0}}, True), ({"precision": {"retries_before": 2}}, False),
       ({"model": {"base": None}}, True), ({"model": {"base": 1.5}}, False)]  # fmt: skip


@pytest.mark.parametrize(("sections", "accepted"), OLD)
def test_a_retired_setting_is_dropped_at_its_old_default_and_refused_by_name_otherwise(
    sections: dict[str, Any], accepted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = {name: {**SMALL.get(name, {}), **values} for name, values in {**SMALL, **sections}.items()}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError, match="unknown key"):
        load_config(path)
    monkeypatch.setattr(config_file, "RETIRED", {"precision.retries_before": 0, "model.base": None})
    if accepted:
        assert load_config(path) == parse()
        assert parse_config(raw) == parse() and raw == yaml.safe_load(path.read_text())
        return
    with pytest.raises(ConfigError, match=r"(precision\.retries_before|model\.base) no longer exists; (0|null) "):
        load_config(path)


def test_no_retired_setting_exists() -> None:
    existing = {row[0] for row in all_keys()}
    assert not existing & config_file.RETIRED.keys()
