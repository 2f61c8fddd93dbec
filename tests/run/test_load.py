"""Text from a saved model: prompts become ids in the form of the family, and the script's three inputs agree."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors

from jaxllm.config import LlamaConfig, RunConfig, T5Config, TrainingConfig
from jaxllm.config.file import ConfigError
from jaxllm.data.pipeline import Pipeline
from jaxllm.data.tokenizer import Tokenizer, encode_blanks, load_tokenizer, train_tokenizer
from jaxllm.generation.text import TextModel
from jaxllm.interop.hf import SpecialIds, load_hf, save_hf
from jaxllm.models import build, init_params
from jaxllm.run.load import load_run, load_text_model
from jaxllm.run.samples import on_one_device, write_sample
from jaxllm.run.trainer import pretrain
from jaxllm.training.program import program_of
from jaxllm.training.sharding import AXES
from tests.run.test_pretrain import copy_of

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "scripts" / "generate.py"
SMALL = {"vocab_size": 384, "d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2}


def save(folder: Path, config: LlamaConfig | T5Config) -> Path:
    model = build(config)
    save_hf(folder, model, init_params(model, jax.random.key(0)))
    train_tokenizer(iter(["the cat sat on the mat"] * 9), vocab_size=384).save(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"), LlamaConfig(**SMALL))


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("t5"), T5Config(**SMALL, head_dim=8))


def byte_tokenizer(folder: Path, *, begins: bool = False, **settings: Any) -> None:
    """A tokenizer as of GPT-2, Llama 3 and Qwen: no padding token, the id 0 is "!", and some begin each text."""
    fast = FastTokenizer(
        models.BPE({each: i for i, each in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast.add_special_tokens(["<|endoftext|>"])
    if begins:
        special = [("<|endoftext|>", 256)]
        fast.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=special)
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|endoftext|>", **settings}))


@pytest.mark.parity
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("settings", [{}, {"add_bos_token": False}, {"add_bos_token": True}, {"bos_token": None}])
def test_a_prompt_begins_as_the_directorys_tokenizer_begins_a_text(
    llama: Path, tmp_path: Path, begins: bool, settings: dict[str, Any]
) -> None:
    """transformers 5 reads tokenizer.json alone; `add_bos_token: true` is what an exported run needs."""
    shutil.copytree(llama, tmp_path / "hf")
    save_hf(tmp_path / "hf", *load_hf(llama), special_ids=SpecialIds(bos=256, eos=(256,)))
    byte_tokenizer(tmp_path / "hf", begins=begins, **settings)
    ids = load_text_model(tmp_path / "hf").encode("ab")
    adds = settings.get("add_bos_token") is True
    assert ids == ([256, 64, 65] if begins or adds else [64, 65])
    if not adds:
        transformers = pytest.importorskip("transformers")
        assert ids == transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")("ab").input_ids


def test_text_is_not_lost_where_a_tokenizer_has_no_padding(llama: Path, tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.pad_id, tokenizer.eos_id) == (256, 256)
    text_model = TextModel.of(*load_hf(llama), tokenizer)
    assert text_model.decode([*text_model.encode("Stop! No!!"), 256, 256]) == "Stop! No!!"


def test_sentinels_written_in_a_prompt_become_sentinels(t5: Path) -> None:
    text_model = load_text_model(t5)
    tokenizer = text_model.tokenizer
    ids = text_model.encode("the <extra_id_0> sat <extra_id_1>")
    first, second = (int(i) for i in tokenizer.sentinel_ids[:2])
    assert ids == [*tokenizer.encode("the "), first, *tokenizer.encode(" sat "), second, tokenizer.eos_id]
    assert text_model.decode([first, *tokenizer.encode(" cat").tolist(), tokenizer.eos_id, 0]) == "<extra_id_0> cat"
    with pytest.raises(ValueError, match="<extra_id_100>, the tokenizer has 100 sentinels"):
        text_model.encode("<extra_id_100>")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a <extra_id_0> <extra_id_1> b", ["a ", 0, 1, " b"]),  # a space alone between sentinels adds nothing
        ("a<extra_id_1> ", ["a", 1]),
        ("  <extra_id_0>a ", [0, "a "]),
        ("<extra_id_0>\n<extra_id_1>", [0, "\n", 1]),
        ("a <extra_id_\u0663> b", ["a <extra_id_\u0663> b"]),  # an Arabic digit is text
        (" ", [" "]),
    ],
)
def test_spaces_between_sentinels_and_other_digits(t5: Path, text: str, parts: list[str | int]) -> None:
    text_model = load_text_model(t5)
    tokenizer = text_model.tokenizer
    ids = [tokenizer.encode(part) if isinstance(part, str) else tokenizer.sentinel_ids[[part]] for part in parts]
    assert text_model.encode(text) == [*np.concatenate(ids).tolist(), tokenizer.eos_id]
    assert encode_blanks(text, tokenizer).tolist() == text_model.encode(text)


class NoExamples(Pipeline):
    """A pipeline that holds nothing out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def validation(self, count: int) -> Iterator[Any]:
        return iter(())


def test_a_prompt_has_one_encoding_in_generation_and_in_the_sample_of_training(t5: Path, tmp_path: Path) -> None:
    text_model = load_text_model(t5)
    config = TrainingConfig(sample_prompt="a <extra_id_0> <extra_id_1> b", sample_tokens=4)
    sample = write_sample(tmp_path, text_model.model, text_model.params, NoExamples(text_model.tokenizer), config)
    assert sample and sample.startswith("--- text with blanks\na <extra_id_0><extra_id_1> b\n--- the model's answer\n")
    assert text_model.decode(text_model.encode(config.sample_prompt)) == "a <extra_id_0><extra_id_1> b"
    assert (tmp_path / "sample.txt").read_text(encoding="utf-8") == sample
    question = TrainingConfig(sample_prompt="a b", sample_tokens=4)  # for a model that is trained on pairs: no blanks
    sample = write_sample(tmp_path, text_model.model, text_model.params, NoExamples(text_model.tokenizer), question)
    assert sample and sample.startswith("--- text\na b\n--- the model's answer\n") and "filled in" not in sample


def test_load_run_names_the_function_that_opens_a_hugging_face_directory(llama: Path) -> None:
    with pytest.raises(ConfigError, match="is a Hugging Face directory, not a run folder; open it with load_hf"):
        load_run(llama)


def test_a_stream_never_shows_half_a_character(llama: Path) -> None:
    text_model = load_text_model(llama)
    ids = text_model.tokenizer.encode("a€😀b").tolist()
    pieces = list(text_model.pieces([[i]] for i in ids))
    assert "".join(pieces) == "a€😀b"
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.fixture
def speak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the script; its exit status, standard output and standard error."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    main = runpy.run_path(str(SCRIPT))["main"]

    def run(folder: Path, *options: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["generate", str(folder), *options])
        return main(), *capsys.readouterr()

    return run


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_argument_file_standard_input_and_batch_say_the_same(
    family: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speak
) -> None:
    folder, lines = request.getfixturevalue(family), tmp_path / "prompts.txt"
    lines.write_text("the <extra_id_0> cat\n", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO("the <extra_id_0> cat\n"))
    said = []
    for source in (["the <extra_id_0> cat"], ["--prompt-file", str(lines)], ["-"], ["--batch", str(lines)]):
        status, out, err = speak(folder, *source, "--temperature=0", "--max-new-tokens=4")
        assert status == 0 and "4 tokens in" in err and "tokens/s" in err
        said.append(out)
    assert len(said[0]) > 1
    assert said[0] == said[1] == said[2] == json.loads(said[3])["text"] + "\n"


def test_compiled_programs_are_kept_for_the_next_call(llama: Path, tmp_path: Path, speak) -> None:
    kept = []
    for _ in range(2):
        jax.clear_caches()
        assert speak(llama, "the cat", "--max-new-tokens=4", "--temperature=0")[0] == 0
        kept.append({path.name for path in (tmp_path / "cache" / "jaxllm").rglob("*-cache")})
    assert any("jit_begin" in name for name in kept[0]) and kept[1] == kept[0]


def test_a_long_text_comes_in_pieces_and_a_stop_string_ends_it(llama: Path, speak) -> None:
    options = ["the cat", "--temperature=0", "--max-new-tokens=40"]
    status, whole, err = speak(llama, *options)
    assert status == 0 and re.search(r"40 tokens in .* the first 32 with compilation in .*, then [\d.]+ tokens/s", err)
    stop = whole[10:13]
    cut = speak(llama, *options, f"--stop={stop}", "--stop=never")[1].removesuffix("\n")
    assert stop in cut and whole.startswith(cut) and len(cut) < len(whole) - 10


def test_batches_cut_at_line_breaks_only_and_their_size_changes_no_sample(llama: Path, tmp_path: Path, speak) -> None:
    lines = tmp_path / "prompts.txt"
    prompts = ["the\x0ccat\u2028sat", "mat", "the\x0ccat\u2028sat"]
    lines.write_text("\n".join(prompts), encoding="utf-8")
    options = ["--batch", str(lines), "--temperature=2", "--max-new-tokens=4"]
    said = [speak(llama, *options, f"--batch-size={size}")[1] for size in (1, 2)]
    rows = [json.loads(line) for line in said[0].split("\n")[:-1]]
    assert [row["prompt"] for row in rows] == prompts
    assert said[0] == said[1] and rows[0]["text"] != rows[2]["text"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["x", "--temperature=0", "--top-k=3"], "top_k, top_p and min_p choose among samples"),
        (["x", "--temperature=nan"], "temperature must be"),
        (["x", "--max-new-tokens=0"], "max_new_tokens must be from 1 to 1000000, got 0"),
        (["x", "--seed=-1"], "seed must be a whole number in"),
        (["x", "--stop="], "non-empty strings"),
        (["--batch", "LONG", "--batch-size=1"], "prompt 1 of 6000 tokens"),
        (["--batch", "EMPTY"], "write one prompt per line"),
        (["--batch", "LONG", "--batch-size=0"], "batch_size must be at least 1, got 0"),
        (["--prompt-file", "BINARY"], "BINARY is not UTF-8 text"),
        (["--prompt-file", "NOWHERE"], "No such file"),
        (["the \udcff cat"], "the prompt is not UTF-8 text (byte 0xff at character 4)"),
        (["x", "--temperature=1e-40"], "temperature must be 0 (greedy) or in"),
        (["x", "--repetition-penalty=1e300"], "repetition_penalty must be at least 1e-30 and at most 1e+30"),
    ],
)
def test_bad_requests_end_in_one_line(llama: Path, tmp_path: Path, speak, options: list[str], message: str) -> None:
    (tmp_path / "LONG").write_text("a\n" + 2000 * "€" + "\n", encoding="utf-8")
    (tmp_path / "EMPTY").touch()
    (tmp_path / "BINARY").write_bytes(b"\xff\x00")
    status, out, err = speak(llama, *(str(tmp_path / each) if each.isupper() else each for each in options))
    assert status == 1 and out == ""
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_more_tokens_than_anything_could_hold_are_refused_before_a_compile(t5: Path, speak) -> None:
    status, out, err = speak(t5, "x", "--max-new-tokens=1000000000000")
    assert status == 1 and out == ""
    assert "max_new_tokens must be from 1 to 1000000, got 1000000000000" in err and err.count("\n") == 1


def test_one_source_of_prompts_is_asked_for(llama: Path, speak) -> None:
    for options in ([], ["x", "--batch", "y"]):
        with pytest.raises(SystemExit):
            speak(llama, *options)


def test_a_folder_that_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a run folder"):
        load_text_model(tmp_path)


def test_a_sample_that_cannot_be_written_fails_no_finished_run(
    short_run: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = copy_of(short_run, tmp_path / "run")
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, sample_tokens=2))
    (tmp_path / "run" / "sample.txt").mkdir()
    (tmp_path / "run" / "loss.png").unlink(missing_ok=True)
    with caplog.at_level("WARNING", logger="jaxllm"):
        assert pretrain(run).finished
    expected = "the sample (training.sample_prompt, sample_tokens) is not made: [Errno 21] Is a directory"
    assert expected in caplog.text and (tmp_path / "run" / "loss.png").exists()


@pytest.mark.parametrize(
    "error", [ValueError("too long"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")]
)
def test_no_error_of_the_sample_fails_a_finished_run(
    error: Exception,
    short_run: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr("jaxllm.run.trainer.write_sample", fail)
    run = copy_of(short_run, tmp_path / "run")
    (tmp_path / "run" / "loss.png").unlink(missing_ok=True)
    assert pretrain(run).finished
    assert (tmp_path / "run" / "loss.png").exists() and f"is not made: {error}" in caplog.text


def test_a_sample_ends_with_the_context_of_its_model(llama: Path, tmp_path: Path) -> None:
    text_model = load_text_model(llama)
    context = text_model.model.config.context
    assert context
    for tokens in (context - 1, context, 100 * context):
        config = TrainingConfig(sample_tokens=tokens)
        assert write_sample(tmp_path, text_model.model, text_model.params, NoExamples(text_model.tokenizer), config)


def test_a_sample_on_several_devices_needs_room_on_one(
    short_run: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Next to the run: parameters in the compute dtype, and two more copies of them while they are laid out."""
    run = dataclasses.replace(short_run, training=dataclasses.replace(short_run.training, sample_tokens=2))
    program, mesh = program_of(run, None), Mesh(np.array(jax.devices()).reshape(1, 1, 1), AXES)
    params = jax.jit(program.fresh_state)().params
    needed = 3 * sum(leaf.size for leaf in jax.tree.leaves(params)) * program.dtype.itemsize

    class Device:
        free = 0

        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": 10**9, "bytes_in_use": 10**9 - self.free}

    (device,) = jax.devices()
    put = jax.device_put
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    monkeypatch.setattr(jax, "device_put", lambda leaf, _: put(leaf, device))
    monkeypatch.setattr(Device, "free", needed)
    assert jax.tree.structure(on_one_device(program, mesh, params)) == jax.tree.structure(params)
    monkeypatch.setattr(Device, "free", needed - 1)
    with caplog.at_level("INFO", logger="jaxllm"):
        assert on_one_device(program, mesh, params) is None
    assert "no sample: it takes" in caplog.text
