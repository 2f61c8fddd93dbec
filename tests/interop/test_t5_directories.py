"""T5 directories: the tie and scale rule of every transformers version, shared tensors, and bits that survive."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxllm
from jaxllm.config import T5Config
from jaxllm.interop import InteropError
from jaxllm.interop.hf import SpecialIds, load_hf_config
from jaxllm.models import abstract_params, build

V11 = T5Config(vocab_size=61, d_model=12, d_ff=20, num_layers=1, num_decoder_layers=2, num_heads=3, head_dim=6)
V10 = dataclasses.replace(V11, gated=False, activation="relu", tie_embeddings=True, scale_logits=True)
UMT5 = dataclasses.replace(V11, relative_per_layer=True, dropout_rate=0.1, decoder_start_id=5)
OWN, TIED = False, True


def random_params(config: T5Config, dtype: str = "float32") -> Any:
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), dtype), abstract_params(build(config))
    )


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """config.json and tensors of each architecture, to be varied by the tests."""
    found = {}
    for name, config in (("v1.1", V11), ("v1.0", V10), ("umt5", UMT5)):
        folder = tmp_path_factory.mktemp("t5") / name
        jaxllm.save_hf(folder, build(config), random_params(config))
        found[name] = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    return found


def write(folder: Path, raw: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("config", [V11, V10, UMT5], ids=["v1.1", "v1.0", "umt5"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 3_000])
def test_export_and_reload_are_bit_equal(tmp_path: Path, config: T5Config, dtype: str, shard_bytes: int) -> None:
    params = random_params(config, dtype)
    jaxllm.save_hf(tmp_path, build(config), params, shard_bytes=shard_bytes)
    model, again = jaxllm.load_hf(tmp_path)
    assert model.config == config and model.dtype == dtype
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_bytes == 3_000)


@pytest.mark.parametrize(
    ("export", "kind", "keys", "head", "tied", "scaled"),
    [
        ("v1.0", "t5", {}, None, TIED, True),  # 4.x leaves defaults out
        ("v1.0", "t5", {"tie_word_embeddings": True}, None, TIED, True),
        ("v1.0", "t5", {"tie_word_embeddings": True, "scale_decoder_outputs": True}, None, TIED, True),
        ("v1.0", "t5", {"tie_word_embeddings": True}, "copy", TIED, True),
        ("v1.1", "t5", {"tie_word_embeddings": False}, "own", OWN, False),  # v1.1, Flan and UL2 by 4.x
        ("v1.1", "t5", {"tie_word_embeddings": True, "scale_decoder_outputs": False}, "own", OWN, False),  # by 5.x
        ("v1.1", "t5", {"tie_word_embeddings": False}, "copy", TIED, False),
        ("v1.1", "t5", {"tie_word_embeddings": False}, None, TIED, False),
        ("v1.1", "t5", {"tie_word_embeddings": True, "scale_decoder_outputs": True}, "own", OWN, True),
        ("v1.1", "mt5", {"tie_word_embeddings": False}, "own", OWN, False),
        ("v1.1", "mt5", {"tie_word_embeddings": True}, "own", OWN, False),  # by 5.x, which drops the old false
        ("v1.1", "mt5", {"tie_word_embeddings": True}, None, TIED, False),
        ("umt5", "umt5", {}, "own", OWN, False),
        ("umt5", "umt5", {"tie_word_embeddings": True}, "own", OWN, False),  # by 5.23, which scales by mistake
        ("umt5", "umt5", {"tie_word_embeddings": True, "scale_decoder_outputs": False}, "own", OWN, False),
        ("umt5", "umt5", {"tie_word_embeddings": True}, None, TIED, True),
    ],
)
def test_tie_and_scale(
    tmp_path: Path,
    exports: Any,
    export: str,
    kind: str,
    keys: dict[str, bool],
    head: str | None,
    tied: bool,
    scaled: bool,
) -> None:
    raw, tensors = exports[export]
    raw = {k: v for k, v in raw.items() if k not in ("tie_word_embeddings", "scale_decoder_outputs")}
    tensors = {k: v for k, v in tensors.items() if k != "lm_head.weight"}
    if head is not None:
        tensors["lm_head.weight"] = tensors["shared.weight"] * (1 if head == "copy" else 2)
    model, params = jaxllm.load_hf(write(tmp_path, {**raw, "model_type": kind, **keys}, tensors))
    assert (model.config.tie_embeddings, model.config.scale_logits) == (tied, scaled)
    assert ("lm_head" in params) != tied
    np.testing.assert_array_equal(params["embed"], tensors["shared.weight"])


@pytest.mark.parametrize("name", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"])
def test_a_shared_tensor_may_be_stored_under_any_of_its_names(tmp_path: Path, exports: Any, name: str) -> None:
    raw, tensors = exports["v1.0"]
    embed = tensors["shared.weight"]
    moved = {name: embed, **{k: v for k, v in tensors.items() if k != "shared.weight"}}
    model, params = jaxllm.load_hf(write(tmp_path, raw, moved))
    assert model.config.tie_embeddings
    np.testing.assert_array_equal(params["embed"], embed)


def test_copies_and_a_table_that_nothing_reads_are_ignored(tmp_path: Path, exports: Any) -> None:
    raw, tensors = exports["v1.1"]
    more = {f"{stack}.embed_tokens.weight": tensors["shared.weight"].copy() for stack in ("encoder", "decoder")}
    table = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": np.ones((32, 3), np.float32)}
    assert jaxllm.load_hf(write(tmp_path, raw, {**tensors, **more, **table}))[0].config == V11
    more["decoder.embed_tokens.weight"] += 1
    with pytest.raises(InteropError, match=r"decoder\.embed_tokens\.weight differs from shared\.weight"):
        jaxllm.load_hf(write(tmp_path, raw, {**tensors, **more}))


def test_a_tied_head_without_scaling_is_exported_as_a_copy(tmp_path: Path) -> None:
    """transformers 4.x scales every tied head; no version scales an untied one."""
    config = dataclasses.replace(V10, scale_logits=False)
    params = random_params(config)
    jaxllm.save_hf(tmp_path, build(config), params)
    tensors = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(tensors["lm_head.weight"], params["embed"])
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    model, again = jaxllm.load_hf(tmp_path)
    assert model.config == config
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_keys_of_old_files(tmp_path: Path, exports: Any) -> None:
    raw, tensors = exports["v1.0"]
    old = {k: v for k, v in raw.items() if k not in ("relative_attention_max_distance", "feed_forward_proj")}
    config = load_hf_config(write(tmp_path, old, tensors))
    assert (config.relative_max_distance, config.gated, config.activation) == (128, False, "relu")


@pytest.mark.parametrize(
    ("proj", "gated", "activation"),
    [
        ("relu", False, "relu"),
        ("gelu", False, "gelu"),
        ("gelu_new", False, "gelu_tanh"),
        ("gated-gelu", True, "gelu_tanh"),
        ("gated-silu", True, "silu"),
        ("gated-relu", True, "relu"),
    ],
)
def test_feed_forward_names(tmp_path: Path, exports: Any, proj: str, gated: bool, activation: Any) -> None:
    raw, tensors = exports["v1.1" if gated else "v1.0"]
    config = load_hf_config(write(tmp_path, {**raw, "feed_forward_proj": proj}, tensors))
    assert (config.gated, config.activation) == (gated, activation)
    jaxllm.save_hf(tmp_path / "again", build(config), random_params(config))
    assert load_hf_config(tmp_path / "again") == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"feed_forward_proj": "gated-tanh"}, "activation 'tanh' is not one of silu"),
        ({"feed_forward_proj": "double-gelu"}, "neither `gated-X` nor `X`"),
        ({"is_gated_act": False}, "is_gated_act contradicts feed_forward_proj 'gated-gelu'"),
        ({"quantization_config": {"bits": 4}}, "only unquantised weights"),
        ({"relative_attention_max_distance": 8}, "relative_max_distance 8 must exceed"),
        ({"model_type": "longt5"}, "model_type 'longt5'; known: llama, .*t5, mt5, umt5"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, exports: Any, change: dict[str, Any], words: str) -> None:
    raw, tensors = exports["v1.1"]
    with pytest.raises(InteropError, match=words):
        load_hf_config(write(tmp_path, {**raw, **change}, tensors))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scale_logits": True}, "scale_logits without tie_embeddings"),
        ({"activation": "gelu"}, "gated-gelu is the tanh form"),
    ],
)
def test_what_no_architecture_has_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    config = dataclasses.replace(V11, **change)
    with pytest.raises(InteropError, match=words):
        jaxllm.save_hf(tmp_path, build(config), random_params(config))


def test_special_ids_reach_both_files(tmp_path: Path) -> None:
    jaxllm.save_hf(tmp_path, build(UMT5), random_params(UMT5), special_ids=SpecialIds(eos=(1,), pad=0))
    for name in ("config.json", "generation_config.json"):
        raw = json.loads((tmp_path / name).read_text())
        assert (raw["eos_token_id"], raw["pad_token_id"], raw["decoder_start_token_id"]) == (1, 0, 5)
