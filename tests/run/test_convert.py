"""Runs to Hugging Face directories and back: no bit changes, and transformers computes the same with the export."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from display.convert import export_run, import_run
from jaxllm.config import LlamaConfig, RunConfig, T5Config
from jaxllm.config.file import load_config
from jaxllm.data import DataError
from jaxllm.data.tokenizer import load_tokenizer, train_tokenizer
from jaxllm.interop.hf import SpecialIds, special_ids
from jaxllm.models import abstract_params, build, init_params
from jaxllm.run.load import load_text_model
from jaxllm.run.start import read_run
from jaxllm.storage.folder import checkpoint_steps
from tests.conftest import full_disk

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "convert_hf.py"
SMALL: dict[str, Any] = {"vocab_size": 384, "d_model": 16, "d_ff": 24, "num_layers": 2, "num_heads": 2}


def assert_same_bits(ours, want) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture(scope="module")
def run(short_run: RunConfig) -> Path:
    return Path(short_run.training.run_dir)


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export_run(run, folder)
    return folder


def test_an_exported_run_is_the_run(run: Path, exported: Path) -> None:
    described, want = read_run(run)
    model, params = jaxllm.load_hf(exported)
    assert_same_bits(params, want)
    ours, theirs = described.model, model.config
    assert isinstance(ours, LlamaConfig) and isinstance(theirs, LlamaConfig)
    assert (theirs.rope, theirs.norm_eps, theirs.max_length) == (ours.rope, ours.norm_eps, ours.max_length)
    a, b = load_text_model(run), load_text_model(exported)
    assert a[2].fingerprint == b[2].fingerprint and a[3:] == b[3:]  # tokenizer; begin, end and padding
    assert special_ids(exported) == SpecialIds(bos=1, eos=(1,), pad=0)


@pytest.mark.parity
def test_transformers_computes_the_same_with_an_export(run: Path, exported: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    described, params = read_run(run)
    model = build(described.model)
    tokens = np.random.default_rng(0).integers(0, described.model.vocab_size, (2, 16))
    with torch.no_grad():
        want = theirs(torch.tensor(tokens)).logits.numpy()
    got = jax.jit(lambda p, t: model.apply({"params": p}, t))(params, jnp.asarray(tokens))
    assert np.abs(np.asarray(got) - want).max() <= 1e-5 * np.abs(want).max()
    assert (theirs.generation_config.bos_token_id, theirs.generation_config.eos_token_id) == (1, 1)


@pytest.mark.parity
def test_transformers_reads_the_tokenizer_of_an_export(run: Path, exported: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(exported), load_text_model(run).tokenizer
    assert (theirs.eos_token, theirs.bos_token, theirs.pad_token) == ("</s>", "</s>", "<pad>")
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.pad_token_id) == (ours.eos_id, ours.eos_id, ours.pad_id)
    assert theirs.model_max_length == read_run(run)[0].model.context
    text = "def  read_(x):\n\treturn x"
    ids = theirs(text, add_special_tokens=False)["input_ids"]
    assert ids == ours.encode(text).tolist() and theirs.decode(ids) == text


def test_a_step_of_a_run_is_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (step,) = checkpoint_steps(run / "checkpoints")
    main = runpy.run_path(str(SCRIPT))["main"]
    sys.argv = ["convert_hf.py", f"{run}@{step}", str(tmp_path / "hf"), "--dtype", "bfloat16"]
    assert main() == 0
    want = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), read_run(run)[1])
    assert_same_bits(jaxllm.load_hf(tmp_path / "hf")[1], want)
    sys.argv[1:3] = [f"{run}@999", str(tmp_path / "other")]
    assert main() == 1 and f"keeps no checkpoint of step 999; it keeps {step}" in capsys.readouterr().err


def test_an_export_is_as_readable_as_any_new_file(run: Path, tmp_path: Path) -> None:
    previous = os.umask(0o022)
    try:
        export_run(run, tmp_path / "hf")
    finally:
        os.umask(previous)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "hf").iterdir()} == {0o644}


def test_a_directory_without_a_tokenizer_is_named_at_its_conversion(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(LlamaConfig(**SMALL))
    jaxllm.save_hf(tmp_path / "hf", model, init_params(model, jax.random.key(0)))
    import_run(tmp_path / "hf", tmp_path / "run")
    assert f"{tmp_path / 'hf'} has no tokenizer; put its tokenizer.json" in caplog.text
    with pytest.raises(DataError, match=r"no tokenizer in .*run; put one there, or give a tokenizer.json"):
        load_text_model(tmp_path / "run")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(LlamaConfig(**SMALL, qkv_bias=True), "bfloat16"), (T5Config(**SMALL, head_dim=8), "float32")],
    ids=["llama", "t5"],
)
def test_an_imported_directory_is_a_run_of_the_same_parameters(
    tmp_path: Path, shape: LlamaConfig | T5Config, dtype: str
) -> None:
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), dtype), abstract_params(build(shape)))
    jaxllm.save_hf(tmp_path / "hf", build(shape), params)
    tokenizer = train_tokenizer(iter(["the cat sat on the mat"] * 9), vocab_size=384)
    tokenizer.save(tmp_path / "hf" / "tokenizer.json")
    import_run(tmp_path / "hf", tmp_path / "run")
    described, found = read_run(tmp_path / "run")
    assert described.model == shape
    assert_same_bits(found, jax.tree.map(lambda x: x.astype(jnp.float32), params))
    assert load_text_model(tmp_path / "run").tokenizer.fingerprint == tokenizer.fingerprint
    with pytest.raises(FileExistsError, match="already holds a run; choose another folder"):
        import_run(tmp_path / "hf", tmp_path / "run")
    with pytest.raises(FileExistsError, match="is a Hugging Face directory; choose another folder"):
        import_run(tmp_path / "hf", tmp_path / "hf")
    with pytest.raises(FileExistsError, match="already holds a run"):
        export_run(tmp_path / "run", tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists() and not (tmp_path / "hf" / "config.yaml").exists()
    export_run(tmp_path / "run", tmp_path / "again", dtype=dtype)
    assert_same_bits(jaxllm.load_hf(tmp_path / "again")[1], params)


def interrupt(*args: object) -> None:
    raise KeyboardInterrupt


SPM = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2}


@pytest.mark.parity
@pytest.mark.parametrize("shape", [LlamaConfig(**SMALL), T5Config(**SMALL, head_dim=8)], ids=["llama", "t5"])
def test_a_sentencepiece_model_goes_there_and_back(tmp_path: Path, shape: LlamaConfig | T5Config) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    texts = (f"the quick brown fox number {i} jumps" for i in range(300))
    name = "spiece.model" if shape.family == "t5" else "tokenizer.model"
    folders = [tmp_path / each for each in ("hf", "run", "again", "run2")]
    jaxllm.save_hf(folders[0], build(shape), init_params(build(shape), jax.random.key(0)))
    with (folders[0] / name).open("wb") as file:
        sentencepiece.SentencePieceTrainer.Train(sentence_iterator=texts, model_writer=file, vocab_size=60, **SPM)
    import_run(folders[0], folders[1])
    export_run(folders[1], folders[2])
    import_run(folders[2], folders[3])
    want = load_tokenizer(folders[0] / name).fingerprint
    assert load_tokenizer(folders[2] / name).fingerprint == want
    loaded = [load_text_model(folder) for folder in folders]
    assert [each.tokenizer.fingerprint for each in loaded] == [want] * 4
    for folder in (folders[1], folders[3]):
        # What the data pipeline looks for in a run's folder, and what the run's config names.
        assert [path.name for path in folder.glob("*.model")] == ["tokenizer.model"]
        assert load_config(folder / "config.yaml").data.tokenizer == str(folder / "tokenizer.model")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folders[2])
    ours = load_tokenizer(folders[2] / name).encode("the quick fox")
    assert theirs("the quick fox", add_special_tokens=False)["input_ids"] == ours.tolist()
    if shape.family == "llama":
        assert loaded[1].begin == loaded[2].begin == loaded[3].begin == (1,)  # of runs and of their export
        assert theirs("the quick fox")["input_ids"] == loaded[2].encode("the quick fox")


@pytest.mark.parametrize("convert", [import_run, export_run])
def test_a_conversion_that_fails_can_be_made_again(
    run: Path, exported: Path, tmp_path: Path, convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = exported if convert is import_run else run, tmp_path / "target"
    target.mkdir()
    (target / "notes.md").write_text("mine")
    with full_disk(), pytest.raises((OSError, ValueError), match="File too large"):
        convert(source, target)
    assert [path.name for path in target.rglob("*")] == ["notes.md"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shutil.copy", interrupt)  # the weights are written by then
        convert(source, target)
    assert [path.name for path in target.rglob("*")] == ["notes.md"]
    move, moved = Path.replace, []

    def second_fails(path: Path, place: Path) -> Path:
        if place.parent == target:
            moved.append(place)
        return interrupt() if len(moved) == 2 else move(path, place)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # while what is whole is put in place
        patch.setattr(Path, "replace", second_fails)
        convert(source, target)
    assert [path.name for path in target.rglob("*")] == ["notes.md"]
    (target / "convert.partial" / "checkpoints").mkdir(parents=True)  # of one that was killed
    convert(source, target)
    assert not list(target.glob("*.partial")) and (target / "notes.md").exists()
    assert load_text_model(target).tokenizer.fingerprint == load_text_model(source).tokenizer.fingerprint


def test_script_converts_a_run_and_names_what_it_cannot_do(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, str(SCRIPT), str(run), str(tmp_path / "hf"), "--dtype", "bfloat16"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"wrote {tmp_path / 'hf'}\n"), done.stderr
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same_bits(
        jaxllm.load_hf(tmp_path / "hf")[1], jax.tree.map(lambda x: x.astype(jnp.bfloat16), read_run(run)[1])
    )
    main = runpy.run_path(str(SCRIPT))["main"]

    def refused(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["convert_hf.py", *map(str, arguments)])
        assert main() == 1
        return capsys.readouterr().err

    assert "a run holds float32" in refused(tmp_path / "hf", tmp_path / "back", "--dtype", "bfloat16")
    assert not (tmp_path / "back").exists()
    assert "neither a run folder (config.yaml) nor a Hugging Face directory" in refused(tmp_path, tmp_path / "back")
    before = {path: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    assert "is a Hugging Face directory; choose another folder" in refused(run, tmp_path / "hf")
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "params.json").write_text("{}")
    assert "with convert_llama_weights_to_hf.py" in refused(tmp_path / "meta", tmp_path / "back")
    assert before == {path: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "tokenizer.json").write_text("mine")
    assert "already holds tokenizer.json; choose another folder" in refused(run, tmp_path / "used")
    assert "already holds tokenizer.json; choose another folder" in refused(tmp_path / "hf", tmp_path / "used")
    with full_disk():
        assert "File too large" in refused(run, tmp_path / "again")
        assert "File too large" in refused(tmp_path / "hf", tmp_path / "back")
    assert not list((tmp_path / "again").iterdir()) and not list((tmp_path / "back").iterdir())
    (tmp_path / "file").touch()
    assert "file is a file; choose another folder" in refused(tmp_path / "hf", tmp_path / "file")
