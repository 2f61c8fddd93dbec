"""The Python blocks of README and of the pages of docs/ that work with runs: each page runs from top to bottom."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from display.convert import export_run, import_run
from jaxllm.config import RunConfig, T5Config
from jaxllm.data.tokenizer import train_tokenizer
from jaxllm.interop.hf import save_hf
from jaxllm.models import build, init_params
from tests.conftest import write_corpus

ROOT = Path(__file__).parent.parent.parent
HERE = (
    "parts.md",
    "study.md",
    "extending.md",
    "evaluation.md",
    "cluster.md",
)  # run by tests of their own, or need an extra
TINY = ["model.d_model=16", "model.d_ff=24", "model.num_layers=1", "model.num_heads=2", "model.vocab_size=420"]
TINY += ["data.sequence_length=32", "training.steps=2", "training.eval_every=2", "training.eval_batches=1"]


def blocks(page: str, language: str = "python") -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    return "\n".join(re.findall(rf"^```{language}\n(.+?)^```", text, flags=re.S | re.M))


@pytest.fixture
def run_page(short_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """A function that runs a page's blocks in a folder with texts and runs of both families."""
    shutil.copytree(short_run.training.run_dir, tmp_path / "runs" / "llama_tiny")
    write_corpus(tmp_path / "texts")
    monkeypatch.chdir(tmp_path)

    def run(page: str, **replaced: str) -> dict[str, Any]:
        code, names = blocks(page), {"__name__": "page"}
        for old, new in replaced.items():
            assert old in code
            code = code.replace(old, new)
        exec(compile(code, page, "exec", dont_inherit=True), names)
        return names

    return run


def test_readme_opens_a_run_and_looks_inside(run_page, short_run: RunConfig, capsys) -> None:
    names = run_page("README.md")
    assert names["model"].config == short_run.model
    guesses = re.findall(r"^after layer (\d+): '", capsys.readouterr().out, flags=re.M)
    assert guesses == [str(layer) for layer in range(short_run.model.num_layers)]
    assert (names["states"] != names["seen"]["layers/after_mlp"][0]).any()


def test_getting_started(run_page) -> None:
    names = run_page("docs/getting_started.md")
    assert names["losses"] and names["validation"] and names["logits"].shape[:2] == (1, 3)


def test_own_text(run_page, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(blocks("docs/own_text.md", "yaml"))
    names = run_page("docs/own_text.md", **{'load_config("mine.yaml")': f'load_config("mine.yaml", {TINY})'})
    assert names["summary"].finished


def test_fine_tuning(run_page) -> None:
    export_run("runs/llama_tiny", "more-hf", dtype=None)
    names = run_page("docs/fine_tune.md")
    params, rule = names["params"], names["rule"]
    updates, _ = rule.update(jax.tree.map(jax.numpy.ones_like, params), rule.init(params), params)
    moved = updates["layers"]["down_proj"]["kernel"]
    assert (moved[: names["first"]] == 0).all() and (moved[names["first"] :] != 0).all()
    assert (updates["embed"] == 0).all() and Path("copy-hf/config.json").is_file()


def test_t5(run_page, tmp_path: Path, capsys) -> None:
    config = T5Config(vocab_size=384, d_model=16, d_ff=16, num_layers=1, num_heads=2, head_dim=8)
    model = build(config)
    save_hf("hf", model, init_params(model, jax.random.key(0)))
    train_tokenizer(["path = os.path.join(folder, name)"] * 9, vocab_size=384).save(tmp_path / "hf" / "tokenizer.json")
    import_run("hf", "runs/t5_tiny")
    names = run_page("docs/t5.md")
    assert names["inputs"].shape == (1, 17) and ".join(folder, name)" in capsys.readouterr().out


def test_decoding(run_page) -> None:
    names = run_page("docs/decode.md")
    assert len(names["rows"]) == 2 and all(log < 0 for log in names["logs"])


def test_mixed_precision(run_page) -> None:
    names = run_page("docs/mixed_precision.md")
    assert int(names["state"].overflows) == 0


def test_every_page_with_python_is_run_by_a_test() -> None:
    run = set(re.findall(r'run_page\("docs/(\w+\.md)"', Path(__file__).read_text(encoding="utf-8")))
    pages = {path.name for path in (ROOT / "docs").glob("*.md") if blocks(f"docs/{path.name}")}
    assert pages == run | set(HERE)
