"""Meta's layout: ranks are joined, q and k rows reordered, and the model is the one of the Hugging Face file."""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxllm.config import RopeConfig
from jaxllm.interop import InteropError
from jaxllm.interop.hf import load_hf
from jaxllm.interop.meta import load_meta
from jaxllm.models import build
from tests.conftest import TOLERANCE
from tests.interop.test_directories import FULL, assert_same_bits, random_params

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "convert_hf.py"
ROPE = RopeConfig(type="llama3", theta=5e5, factor=8.0, original_max_length=8192)
CONFIG = dataclasses.replace(FULL, num_heads=4, num_kv_heads=2, head_dim=6, max_length=131072, rope=ROPE, d_ff=40)
NAMES = {
    "q_proj": "attention.wq",
    "k_proj": "attention.wk",
    "v_proj": "attention.wv",
    "o_proj": "attention.wo",
    "gate_proj": "feed_forward.w1",
    "up_proj": "feed_forward.w3",
    "down_proj": "feed_forward.w2",
}


def neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `halves`: as Meta rotates them."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_meta(folder: Path, params, *, ranks: int, columns: bool) -> None:
    """What Meta's trainer would have saved, cut into ranks."""
    files: list[dict[str, np.ndarray]] = [{} for _ in range(ranks)]

    def put(name: str, array, axis: int | None) -> None:
        parts = [array] * ranks if axis is None else np.split(array, ranks, axis=axis)
        for file, part in zip(files, parts, strict=True):
            file[name] = np.ascontiguousarray(part)

    put("tok_embeddings.weight", np.pad(np.asarray(params["embed"]), ((0, 1), (0, 0))), 1 if columns else 0)
    put("output.weight", np.pad(np.asarray(params["lm_head"]), ((0, 1), (0, 0))), 0)
    put("norm.weight", np.asarray(params["final_norm"]["weight"]), None)
    for i in range(CONFIG.num_layers):
        for ours, theirs in (("attn_norm", "attention_norm"), ("mlp_norm", "ffn_norm")):
            put(f"layers.{i}.{theirs}.weight", np.asarray(params["layers"][ours]["weight"][i]), None)
        for ours, theirs in NAMES.items():
            kernel = np.asarray(params["layers"][ours]["kernel"][i]).T
            bias = np.asarray(params["layers"][ours]["bias"][i])
            heads = {"q_proj": CONFIG.num_heads, "k_proj": CONFIG.num_kv_heads}.get(ours)
            if heads:
                kernel, bias = neighbours(kernel, heads), neighbours(bias, heads)
            rows = ours not in ("o_proj", "down_proj")
            put(f"layers.{i}.{theirs}.weight", kernel, 0 if rows else 1)
            put(f"layers.{i}.{theirs}.bias", bias, 0 if rows else None)
    for number, file in enumerate(files):
        save_file(file, folder / f"consolidated.{number:02d}.safetensors")
    raw = {"dim": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "norm_eps": 1e-5, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps(raw | {"rope_theta": 5e5, "use_scaled_rope": True}))


@pytest.mark.parametrize(("ranks", "columns"), [(1, False), (2, False), (2, True)])
def test_ranks_are_joined_and_rows_reordered(tmp_path: Path, ranks: int, columns: bool) -> None:
    params = random_params(CONFIG, "bfloat16")
    write_meta(tmp_path, params, ranks=ranks, columns=columns)
    model, found = load_meta(tmp_path)
    assert model.config == dataclasses.replace(CONFIG, vocab_size=98) and model.dtype == jnp.bfloat16
    for name in ("embed", "lm_head"):
        found[name] = found[name][:-1]
    assert_same_bits(found, params)


def convert(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """`scripts/convert_hf.py` as a user runs it, in this process."""
    monkeypatch.setattr(sys, "argv", ["convert_hf.py", *map(str, arguments)])
    return runpy.run_path(str(SCRIPT))["main"]()


@pytest.mark.parametrize("options", [[], ["--dtype", "float32", "--max-length", "64"]])
def test_the_script_makes_a_directory_of_two_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    write_meta(tmp_path, random_params(CONFIG, "bfloat16"), ranks=2, columns=True)
    assert convert(monkeypatch, tmp_path, tmp_path / "hf", *options) == 0
    model, params = load_hf(tmp_path / "hf")
    want = load_meta(tmp_path, **({"dtype": "float32", "max_length": 64} if options else {}))
    assert (model.config, model.dtype) == (want[0].config, want[0].dtype)
    assert model.dtype == ("float32" if options else "bfloat16")
    assert model.config.max_length == (64 if options else 131072)
    assert_same_bits(params, want[1])


@pytest.mark.parity
@pytest.mark.filterwarnings("default")  # torch warns about itself
def test_transformers_opens_what_the_script_made_of_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    params = random_params(CONFIG, "bfloat16")
    write_meta(tmp_path, params, ranks=2, columns=False)
    to_pickles(tmp_path, torch)
    assert convert(monkeypatch, tmp_path, tmp_path / "hf") == 0
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())  # no tensor missing, left over or of another shape
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 16))
    with torch.no_grad():
        want = theirs(torch.tensor(tokens)).logits.numpy()[..., :-1]  # without the row that `write_meta` added
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    got = jax.jit(lambda p, t: build(CONFIG).apply({"params": p}, t))(params, jnp.asarray(tokens))
    assert np.abs(np.asarray(got) - want).max() <= TOLERANCE["float32"] * np.abs(want).max()


def to_pickles(folder: Path, torch) -> None:
    """Rewrites the ranks as torch.save does it, which is how Meta published them."""
    for path in sorted(folder.glob("*.safetensors")):
        tensors = {k: torch.tensor(v.view(np.int16)).view(torch.bfloat16) for k, v in load_file(path).items()}
        torch.save(tensors, path.with_suffix(".pth"))
        path.unlink()


@pytest.mark.parity
@pytest.mark.filterwarnings("default")  # torch warns about itself
def test_torch_pickles_of_two_ranks_are_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    params = random_params(CONFIG, "bfloat16")
    write_meta(tmp_path, params, ranks=2, columns=False)
    to_pickles(tmp_path, torch)
    assert sorted(path.name for path in tmp_path.glob("cons*")) == ["consolidated.00.pth", "consolidated.01.pth"]
    model, found = load_meta(tmp_path)
    assert (model.config.num_heads, model.config.num_kv_heads, model.dtype) == (4, 2, jnp.bfloat16)
    for name in ("embed", "lm_head"):
        found[name] = found[name][:-1]
    assert_same_bits(found, params)


def test_pickles_without_torch_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "params.json").write_text('{"dim": 24, "n_layers": 2, "n_heads": 4}')
    (tmp_path / "consolidated.00.pth").touch()
    with pytest.raises(InteropError, match=r"consolidated.00.pth is a torch pickle; reading it needs: pip install"):
        load_meta(tmp_path)


def test_neighbouring_pairs_score_as_reordered_halves_do() -> None:
    """The definition: Meta rotates (x[2i], x[2i+1]) as one complex number."""
    rng = np.random.default_rng(0)
    head, angles = 6, rng.uniform(0, 6, 3)
    rows = rng.standard_normal((head, 5))  # q_proj of one head, halves layout
    x = rng.standard_normal(5)
    ours = rows @ x
    turned = (
        ours[:3] * np.cos(angles) - ours[3:] * np.sin(angles),
        ours[3:] * np.cos(angles) + ours[:3] * np.sin(angles),
    )
    theirs = (neighbours(rows, 1) @ x).reshape(3, 2)
    complex_turn = (theirs[:, 0] + 1j * theirs[:, 1]) * np.exp(1j * angles)
    np.testing.assert_allclose(turned[0], complex_turn.real)
    np.testing.assert_allclose(turned[1], complex_turn.imag)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text('{"dim": 24, "n_layers": 2, "n_heads": 4}')
    with pytest.raises(InteropError, match=r"holds no consolidated\*.pth"):
        load_meta(tmp_path)
    save_file({"norm.weight": np.zeros(24, np.float32)}, tmp_path / "consolidated.00.safetensors")
    with pytest.raises(InteropError, match=r"lacks tensor tok_embeddings.weight"):
        load_meta(tmp_path)
