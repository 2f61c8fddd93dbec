"""Talking to a saved model: prompts become ids as the family wants them, and the script's three ways in agree."""

from __future__ import annotations

import io
import json
import runpy
import sys
from pathlib import Path

import jax
import pytest

from jaxllm.config import LlamaConfig, T5Config
from jaxllm.config_file import ConfigError
from jaxllm.data.tokenizer import train_tokenizer
from jaxllm.interop.hf import save_hf
from jaxllm.models import build, init_params
from jaxllm.training.speaker import load_speaker

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "generate.py"
SMALL = {"vocab_size": 384, "d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2}


def save(folder: Path, config: LlamaConfig | T5Config) -> Path:
    model = build(config)
    save_hf(folder, model, init_params(model, jax.random.key(0)))
    train_tokenizer(iter(["the cat sat on the mat"] * 9), vocab_size=384).save(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"), LlamaConfig(**SMALL))


def test_sentinels_written_in_a_prompt_become_sentinels(tmp_path: Path) -> None:
    speaker = load_speaker(save(tmp_path / "t5", T5Config(**SMALL, head_dim=8)))
    tokenizer = speaker.tokenizer
    ids = speaker.encode("the <extra_id_0> sat <extra_id_1>")
    first, second = (int(i) for i in tokenizer.sentinel_ids[:2])
    assert ids == [*tokenizer.encode("the "), first, *tokenizer.encode(" sat "), second, tokenizer.eos_id]
    assert speaker.decode([first, *tokenizer.encode(" cat").tolist(), tokenizer.eos_id, 0]) == "<extra_id_0> cat"
    with pytest.raises(ValueError, match="<extra_id_100>, the tokenizer has 100 sentinels"):
        speaker.encode("<extra_id_100>")


def test_a_stream_never_shows_half_a_character(llama: Path) -> None:
    speaker = load_speaker(llama)
    ids = speaker.tokenizer.encode("a€😀b").tolist()
    pieces = list(speaker.pieces([[i]] for i in ids))
    assert "".join(pieces) == "a€😀b"
    assert not any("\ufffd" in piece for piece in pieces)


def test_argument_standard_input_and_batch_say_the_same(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    lines = tmp_path / "prompts.txt"
    lines.write_text("the cat\n", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n"))
    said = []
    for source in (["the cat"], ["-"], ["--batch", str(lines)]):
        monkeypatch.setattr(sys, "argv", ["generate", str(llama), *source, "--temperature=0", "--max-new-tokens=4"])
        assert main() == 0
        captured = capsys.readouterr()
        assert "tokens/s" in captured.err
        said.append(captured.out)
    assert said[0] == said[1] == json.loads(said[2])["text"] + "\n"
    monkeypatch.setattr(sys, "argv", ["generate", str(llama), "x", "--temperature=0", "--top-k=3"])
    assert main() == 1
    assert "error: top_k" in capsys.readouterr().err


def test_the_size_of_a_batch_changes_no_sample(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    lines = tmp_path / "prompts.txt"
    lines.write_text("the cat\nthe cat\n", encoding="utf-8")
    said = []
    for size in ("1", "2"):
        options = ["--batch", str(lines), "--batch-size", size, "--temperature=2", "--max-new-tokens=4"]
        monkeypatch.setattr(sys, "argv", ["generate", str(llama), *options])
        assert main() == 0
        said.append(capsys.readouterr().out)
    first, second = (json.loads(line)["text"] for line in said[0].splitlines())
    assert said[0] == said[1] and first != second


def test_a_folder_that_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a run folder"):
        load_speaker(tmp_path)
