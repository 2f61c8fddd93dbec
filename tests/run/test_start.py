"""`training.init_from`: a run or a Hugging Face directory starts another run, and only as the same model."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxllm
from display.convert import export_run, import_run
from jaxllm.config import RunConfig
from jaxllm.config.file import ConfigError, dump_config, load_config, parse_config
from jaxllm.data.tokenizer import load_tokenizer, train_tokenizer
from jaxllm.models import build
from jaxllm.run.load import load_text_model
from jaxllm.run.start import load_initial_params, read_run
from jaxllm.run.trainer import pretrain
from jaxllm.storage.checkpoint import CheckpointError
from tests.run.test_pretrain import config


def starting_from(first: RunConfig, source: Path, **changes):
    run_dir = Path(first.training.run_dir)
    sections = {
        "model": {"rope": {"theta": 10000.0}},
        "data": {"tokenizer": str(run_dir / "tokenizer.json")},
        "training": {
            "init_from": str(source),
            "run_dir": str(run_dir.parent / "second"),
            "steps": 1,
            "sample_tokens": 0,
        },
        "optimizer": {"learning_rate": 1e-30, "weight_decay": 0.0},
    }
    for name, values in changes.items():
        sections[name] = {**sections[name], **values}
    return config(run_dir.parent / "second", Path(first.data.path), **sections)


def assert_close(ours, want) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-7)


def test_a_run_starts_from_given_parameters(short_run: RunConfig, tmp_path: Path) -> None:
    source = Path(short_run.training.run_dir)
    _, want = read_run(source)
    assert_close(load_initial_params(source, build(short_run.model)), want)
    jaxllm.save_hf(tmp_path / "hf", build(short_run.model), want)
    run = starting_from(short_run, tmp_path / "hf", training={"run_dir": str(tmp_path / "second")})
    summary = pretrain(run)  # with a learning rate of nothing
    assert summary.step == 1 and summary.resumed_from == 0
    assert_close(read_run(tmp_path / "second")[1], want)
    shutil.rmtree(tmp_path / "hf")
    assert pretrain(run).resumed_from == 1  # its own checkpoint goes before init_from


def test_another_model_is_refused_by_its_keys(short_run: RunConfig) -> None:
    other = starting_from(short_run, Path(short_run.training.run_dir), model={"norm_eps": 1e-6, "rope": {"theta": 5e5}})
    with pytest.raises(ConfigError, match=r"(?s)model.rope.theta: 10000.0 -> 500000.0.*model.norm_eps: 1e-05 -> 1e-06"):
        load_initial_params(other.training.init_from, build(other.model))
    same = starting_from(short_run, Path(short_run.training.run_dir), model={"remat": "dots", "max_length": 4096})
    load_initial_params(same.training.init_from, build(same.model))


def test_places_without_parameters_are_named(short_run: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither a run folder .* nor a Hugging Face directory"):
        load_initial_params(tmp_path, build(short_run.model))
    shutil.copy(Path(short_run.training.run_dir) / "config.yaml", tmp_path)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* yet"):
        load_initial_params(tmp_path, build(short_run.model))
    with pytest.raises(ConfigError, match=r"needs its tokenizer; set data.tokenizer="):
        parse_config({"model": {"family": "llama", "vocab_size": 9, "d_model": 8, "d_ff": 8, "num_layers": 1,
                                "num_heads": 2}, "training": {"init_from": "x"}})  # fmt: skip


def test_another_tokenizer_is_a_warning(short_run: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = Path(short_run.training.run_dir)
    own, other = load_tokenizer(source / "tokenizer.json"), train_tokenizer(["another text"], vocab_size=370)
    with caplog.at_level("WARNING", logger="jaxllm"):
        load_initial_params(source, build(short_run.model), tokenizer=own)
        assert not caplog.records
        load_initial_params(source, build(short_run.model), tokenizer=other)
        assert len(caplog.records) == 1
        # One that can't be read here, such as Llama 3's tokenizer.model, is not the one that the run reads.
        both = shutil.copytree(source, tmp_path / "both")
        (both / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
        load_initial_params(both, build(short_run.model), tokenizer=own)
        assert len(caplog.records) == 1
    assert f"set data.tokenizer={source / 'tokenizer.json'} unless that is on purpose" in caplog.text


def test_converted_parameters_are_no_run_to_go_on_with(short_run: RunConfig, tmp_path: Path) -> None:
    source, folder = Path(short_run.training.run_dir), tmp_path / "converted"
    export_run(source, tmp_path / "hf")
    import_run(tmp_path / "hf", folder)
    run = dataclasses.replace(load_config(folder / "config.yaml"), data=short_run.data)
    (folder / "config.yaml").write_text(dump_config(run))
    with pytest.raises(CheckpointError, match=rf"holds parameters alone; .* training.init_from={folder}"):
        pretrain(run)


def test_parameters_trained_with_a_kernel_of_another_machine_are_read(short_run: RunConfig, tmp_path: Path) -> None:
    folder = shutil.copytree(short_run.training.run_dir, tmp_path / "gpu")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("attention: auto", "attention: cudnn"))
    assert "attention: cudnn" in (folder / "config.yaml").read_text()
    assert load_text_model(folder).encode("the cat")
    export_run(folder, tmp_path / "hf")
    load_initial_params(folder, build(short_run.model))
