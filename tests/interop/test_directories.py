"""Directories of safetensors: written and read bit for bit, streamed, and refused by name when they do not fit."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import struct
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxllm
from jaxllm.config import LlamaConfig, RopeConfig
from jaxllm.interop import InteropError
from jaxllm.interop.hf import SpecialIds, load_hf_config, special_ids
from jaxllm.models import abstract_params, build
from tests.conftest import unreadable

TINY = LlamaConfig(
    vocab_size=97, d_model=24, d_ff=40, num_layers=2, num_heads=3, num_kv_heads=1, head_dim=6, max_length=64
)
FULL = dataclasses.replace(TINY, qkv_bias=True, out_bias=True, mlp_bias=True)


def random_params(config: LlamaConfig, dtype: str = "float32"):
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), dtype), abstract_params(build(config))
    )


def assert_same_bits(ours, want) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def second_reader(path: Path) -> dict[str, np.ndarray]:
    """The file format by its specification: a length, a JSON header, bytes."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    kinds = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
    found = {}
    for name, part in header.items():
        if name != "__metadata__":
            start, stop = (8 + size + offset for offset in part["data_offsets"])
            found[name] = np.frombuffer(data[start:stop], kinds[part["dtype"]]).reshape(part["shape"])
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 20_000])
def test_export_and_reload_are_bit_equal(tmp_path: Path, dtype: str, shard_bytes: int) -> None:
    params = random_params(FULL, dtype)
    jaxllm.save_hf(tmp_path, build(FULL), params, shard_bytes=shard_bytes)
    model, again = jaxllm.load_hf(tmp_path)
    assert model.config == FULL and model.dtype == dtype
    assert_same_bits(again, params)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes == 20_000)
    assert all(path.stat().st_size < shard_bytes + 4000 for path in files)  # the header comes on top


def test_the_files_hold_transposed_kernels_of_single_layers(tmp_path: Path) -> None:
    params = random_params(FULL, "bfloat16")
    jaxllm.save_hf(tmp_path, build(FULL), params)
    found = second_reader(tmp_path / "model.safetensors")
    for layer in range(2):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            stem = f"model.layers.{layer}.self_attn.{name}"
            kernel, bias = params["layers"][name]["kernel"][layer], params["layers"][name]["bias"][layer]
            np.testing.assert_array_equal(found[f"{stem}.weight"], np.asarray(kernel).T)
            np.testing.assert_array_equal(found[f"{stem}.bias"], np.asarray(bias))
    np.testing.assert_array_equal(found["lm_head.weight"], np.asarray(params["lm_head"]))
    assert len(found) == 3 + 2 * (2 + 7 * 2)


def test_dtype_is_a_choice_and_by_default_loses_nothing(tmp_path: Path) -> None:
    params = random_params(TINY, "bfloat16")
    jaxllm.save_hf(tmp_path, build(TINY), params)
    model, wide = jaxllm.load_hf(tmp_path, dtype="float32")
    assert model.dtype == jnp.float32
    assert_same_bits(wide, jax.tree.map(lambda x: x.astype(jnp.float32), params))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)
    save_file(tensors, tmp_path / "model.safetensors")
    assert jaxllm.load_hf(tmp_path)[0].dtype == jnp.float32  # the narrowest that holds bfloat16 and float16


def test_every_bfloat16_number_widens_to_itself(tmp_path: Path) -> None:
    numbers = np.arange(1 << 16, dtype=np.uint16).view(jnp.bfloat16)
    for width in (1 << 8, 300):  # whole strips of rows, and a part of one
        config = dataclasses.replace(TINY, vocab_size=1 << 8, d_model=1 << 8, d_ff=width, num_heads=2)
        params = random_params(config, "bfloat16")
        tile = np.resize(numbers, (2, 1 << 8, width))
        params["layers"]["up_proj"]["kernel"] = jnp.asarray(tile)  # transposed in the file
        params["embed"] = jnp.asarray(numbers.reshape(1 << 8, 1 << 8))  # as it is
        jaxllm.save_hf(tmp_path, build(config), params)
        _, wide = jaxllm.load_hf(tmp_path, dtype="float32")
        for found, narrow in ((wide["layers"]["up_proj"]["kernel"], tile), (wide["embed"], numbers.reshape(256, 256))):
            assert found.dtype == jnp.float32
            np.testing.assert_array_equal(np.asarray(found), narrow.astype(np.float32))  # NaN where NaN


def test_a_tensor_of_many_pieces_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(FULL, vocab_size=700, d_model=300, d_ff=260)
    params = random_params(config)
    jaxllm.save_hf(tmp_path, build(config), params)
    monkeypatch.setattr("jaxllm.interop.safetensors_dir._PIECE_BYTES", 1)
    assert_same_bits(jaxllm.load_hf(tmp_path)[1], params)


@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_every_dtype_is_read_as_every_other(tmp_path: Path, stored: str, wanted: str) -> None:
    params = random_params(FULL, stored)
    jaxllm.save_hf(tmp_path, build(FULL), params)
    assert_same_bits(jaxllm.load_hf(tmp_path, dtype=wanted)[1], jax.tree.map(lambda x: x.astype(wanted), params))


@pytest.mark.parametrize("dtype", ["int8", "fp16", "complex64", "float64"])
def test_a_dtype_that_would_not_hold_weights_is_refused(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(InteropError, match=f"weights cannot be {dtype}; use one of float32, bfloat16, float16"):
        jaxllm.save_hf(tmp_path / "out", build(TINY), random_params(TINY), dtype=dtype)
    assert not (tmp_path / "out").exists()
    jaxllm.save_hf(tmp_path, build(TINY), random_params(TINY))
    with pytest.raises(InteropError, match=f"weights cannot be {dtype}"):
        jaxllm.load_hf(tmp_path, dtype=dtype)


def test_a_second_export_replaces_the_first(tmp_path: Path) -> None:
    jaxllm.save_hf(tmp_path, build(TINY), random_params(TINY), shard_bytes=20_000)
    params = jax.tree.map(lambda x: 2 * x, random_params(TINY))
    jaxllm.save_hf(tmp_path, build(TINY), params)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    assert_same_bits(jaxllm.load_hf(tmp_path)[1], params)


@pytest.mark.parametrize("before", [1_000_000, 20_000], ids=["one file", "shards"])
@pytest.mark.parametrize("after", [1_000_000, 20_000], ids=["one file", "shards"])
def test_an_export_that_cannot_be_finished_leaves_the_first_whole(
    tmp_path: Path, before: int, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = random_params(TINY)
    jaxllm.save_hf(tmp_path, build(TINY), first, shard_bytes=before)
    write = Path.write_text

    def full(self: Path, *args, **kwargs) -> int:
        write(self, "{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        jaxllm.save_hf(tmp_path, build(TINY), jax.tree.map(lambda x: x + 1, first), shard_bytes=after)
    assert not list(tmp_path.glob("*.partial"))
    assert_same_bits(jaxllm.load_hf(tmp_path)[1], first)


def test_tied_head_is_decided_by_config_and_file(tmp_path: Path) -> None:
    tied = dataclasses.replace(TINY, tie_embeddings=True)
    jaxllm.save_hf(tmp_path, build(tied), random_params(tied))
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    embed = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embed.copy()}, tmp_path / "model.safetensors")
    model, params = jaxllm.load_hf(tmp_path)
    assert model.config.tie_embeddings and "lm_head" not in params
    save_file({**tensors, "lm_head.weight": embed + 1}, tmp_path / "model.safetensors")
    model, params = jaxllm.load_hf(tmp_path)
    assert not model.config.tie_embeddings
    np.testing.assert_array_equal(params["lm_head"], embed + 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "missing tensors: model.layers.1.mlp.up_proj.weight"),
        (lambda t: t.update(extra=np.zeros(2, np.float32)), "unexpected tensors: extra"),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(7, np.float32)}),
            r"wrong shape or dtype: model.norm.weight \[7\], config.json makes it \[24\]",
        ),
        (lambda t: t.update({"model.norm.weight": np.zeros(24, np.int8)}), "model.norm.weight is I8"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, change, words: str) -> None:
    jaxllm.save_hf(tmp_path, build(TINY), random_params(TINY))
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InteropError, match=words):
        jaxllm.load_hf(tmp_path)


def test_old_buffers_are_ignored(tmp_path: Path) -> None:
    jaxllm.save_hf(tmp_path, build(TINY), random_params(TINY))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(3, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_same_bits(jaxllm.load_hf(tmp_path)[1], random_params(TINY))


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InteropError, match=r"no config.json .*load_run opens a run"):
        jaxllm.load_hf(tmp_path)
    with pytest.raises(InteropError, match=r"meta-llama/Llama-3.2-1B is not a directory; .*nothing is downloaded"):
        jaxllm.load_hf("meta-llama/Llama-3.2-1B")
    jaxllm.save_hf(tmp_path, build(TINY), random_params(TINY), shard_bytes=20_000)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(InteropError, match=r"model-00002-of-00003.safetensors is not a whole safetensors file"):
        jaxllm.load_hf(tmp_path)
    shard.unlink()
    with pytest.raises(InteropError, match=r"lacks model-00002-of-00003.safetensors"):
        jaxllm.load_hf(tmp_path)
    shard.write_bytes((tmp_path / "model-00003-of-00003.safetensors").read_bytes())
    with pytest.raises(InteropError, match=r"places tensor .* in model-00002-of-00003.safetensors, which lacks it"):
        jaxllm.load_hf(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InteropError, match=r"only pytorch_model.bin, a pickle"):
        jaxllm.load_hf(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": 3}}')
    with pytest.raises(InteropError, match=r"index.json has no weight_map of tensor names to files"):
        jaxllm.load_hf(tmp_path)


@pytest.mark.parametrize("place", ["../elsewhere/{}", "{folder}/{}", "sub/{}", "..\\{}", "..", ""])
def test_an_index_that_leaves_its_folder_is_refused(tmp_path: Path, place: str) -> None:
    folder, index = tmp_path / "model", tmp_path / "model" / "model.safetensors.index.json"
    jaxllm.save_hf(folder, build(TINY), random_params(TINY), shard_bytes=20_000)
    shutil.copytree(folder, tmp_path / "elsewhere")
    shutil.copytree(folder, folder / "sub")
    placed = json.loads(index.read_text())["weight_map"]
    file = place.format(placed["lm_head.weight"], folder=tmp_path / "elsewhere")
    index.write_text(json.dumps({"weight_map": placed | {"lm_head.weight": file}}))
    with pytest.raises(InteropError, match=rf"lm_head.weight in {re.escape(repr(file))}, which is not a file of its"):
        jaxllm.load_hf(folder)


@pytest.mark.parametrize(
    "window",
    [{}, {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}],
)
def test_layers_are_bounded_by_the_files(tmp_path: Path, window: dict) -> None:
    """Names of a trillion layers would fill the memory before the first missing one was found."""
    jaxllm.save_hf(tmp_path, build(TINY), random_params(TINY))
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | window | {"num_hidden_layers": 10**12}))
    with pytest.raises(InteropError, match=r"makes 1000000000000 layers, but the files of .* hold 21 tensors"):
        jaxllm.load_hf(tmp_path)


def test_a_file_that_may_not_be_read_is_not_called_damaged(open_folder: Path) -> None:
    jaxllm.save_hf(open_folder, build(TINY), random_params(TINY))
    for name in ("model.safetensors", "config.json"):
        with unreadable(open_folder / name):
            with pytest.raises(
                InteropError, match=rf"{open_folder / name} cannot be read: Permission denied; check its"
            ):
                jaxllm.load_hf(open_folder)


def test_parameters_of_another_model_are_not_exported(tmp_path: Path) -> None:
    with pytest.raises(InteropError, match="missing: layers/down_proj/bias"):
        jaxllm.save_hf(tmp_path, build(FULL), random_params(TINY))
    wide = dataclasses.replace(TINY, d_ff=41)
    with pytest.raises(
        InteropError, match=r"not those of the model: layers/down_proj/kernel \[2, 40, 24\], not \[2, 41"
    ):
        jaxllm.save_hf(tmp_path, build(wide), random_params(TINY))
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(InteropError, match="file is a file; give a directory"):
        jaxllm.save_hf(tmp_path / "file", build(TINY), random_params(TINY))


def test_reading_needs_little_more_than_the_parameters(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, vocab_size=4096, d_model=512, d_ff=1536, num_layers=3, num_heads=8, head_dim=64)
    params = random_params(config, "bfloat16")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    jaxllm.save_hf(tmp_path, build(config), params)
    tracemalloc.start()
    again = jaxllm.load_hf(tmp_path)[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert_same_bits(again, params)
    assert size < peak < 1.2 * size  # NumPy's memory; XLA takes the stacks over


def test_an_export_without_ids_keeps_none_of_an_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for ids in (SpecialIds(bos=1, eos=(2, 5), pad=0), SpecialIds(), None):
        jaxllm.save_hf("~/model", build(TINY), random_params(TINY), special_ids=ids)
        assert special_ids(tmp_path / "model") == special_ids("~/model") == (ids or SpecialIds())


def test_special_ids_are_declared_and_read(tmp_path: Path) -> None:
    jaxllm.save_hf(tmp_path, build(TINY), random_params(TINY))
    assert special_ids(tmp_path) == SpecialIds()
    ids = SpecialIds(bos=1, eos=(2, 5), pad=0)
    jaxllm.save_hf(tmp_path, build(TINY), random_params(TINY), special_ids=ids)
    assert special_ids(tmp_path) == ids
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["eos_token_id"] == [2, 5]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7, "pad_token_id": null}')
    assert special_ids(tmp_path) == SpecialIds(bos=1, eos=(7,), pad=0)
    (tmp_path / "generation_config.json").unlink()
    absent = ("bos_token_id", "eos_token_id", "pad_token_id")
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k not in absent}))
    assert special_ids(tmp_path) == SpecialIds(bos=1, eos=(2,), pad=None)  # LlamaConfig's
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(InteropError, match=r"generation_config.json: eos_token_id must be of type int, got 'x'"):
        special_ids(tmp_path)


def edited(tmp_path: Path, **changes) -> LlamaConfig:
    """The config read back after editing config.json; a value of `...` removes the key."""
    params = {"model.embed_tokens.weight": np.zeros((97, 24), np.float32)}
    save_file(params, tmp_path / "model.safetensors")
    raw = jaxllm.interop.llama.write_config(TINY) | changes
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v != "absent"}))
    return load_hf_config(tmp_path)


def test_missing_keys_take_the_documented_defaults(tmp_path: Path) -> None:
    gone = ("rms_norm_eps", "num_key_value_heads", "max_position_embeddings", "attention_bias", "mlp_bias")
    rope = ("rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "head_dim", "hidden_act")
    config = edited(tmp_path, **{key: "absent" for key in (*gone, *rope)})
    assert config == dataclasses.replace(
        TINY, norm_eps=1e-6, num_kv_heads=3, head_dim=8, max_length=2048, rope=RopeConfig(theta=10000.0)
    )
    mistral = edited(tmp_path, model_type="mistral", sliding_window="absent", num_key_value_heads="absent",
                     num_attention_heads=16, hidden_size=32)  # fmt: skip
    assert mistral.sliding_window == 4096 and mistral.num_kv_heads == 8
    assert edited(tmp_path, model_type="mistral", sliding_window=None).sliding_window is None
    qwen3 = edited(tmp_path, model_type="qwen3", head_dim="absent", use_sliding_window="absent")
    assert qwen3.head_dim == 128 and qwen3.qk_norm and qwen3.sliding_window is None and not qwen3.qkv_bias


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("raw", "rope"),
    [
        ({"rope_theta": 5e5, "rope_parameters": "absent"}, RopeConfig(theta=5e5)),
        ({"rope_theta": "absent", "rope_parameters": {"rope_theta": 5e5}}, RopeConfig(theta=5e5)),
        ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 5e5}}, RopeConfig(theta=5e5)),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}},
            RopeConfig(type="linear", theta=5e5, factor=2),
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 5e5},
            RopeConfig(type="llama3", theta=5e5, factor=8.0, original_max_length=16),
        ),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}, "rope_parameters": {"rope_theta": 7.0}},
            RopeConfig(type="dynamic", factor=3.0),
        ),
        (
            {
                "rope_scaling": {"type": "su", "short_factor": [1.0] * 3, "long_factor": [2] * 3,
                                 "original_max_position_embeddings": 8},
                "original_max_position_embeddings": 16,
            },
            RopeConfig(type="longrope", short_factor=(1.0,) * 3, long_factor=(2.0,) * 3, original_max_length=16),
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "truncate": False, "beta_fast": None,
                                 "mscale": 0.7, "mscale_all_dim": 0.8, "rope_theta": 1e4}},
            RopeConfig(type="yarn", factor=4.0, truncate=False, mscale=0.7, mscale_all_dim=0.8),
        ),
    ],
)  # fmt: skip
def test_rope_of_both_generations_of_config(tmp_path: Path, raw: dict, rope: RopeConfig) -> None:
    assert edited(tmp_path, **raw).rope == rope


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"model_type": "gemma"}, "model_type 'gemma'; known: llama, mistral, qwen2, qwen3"),
        ({"rope_scaling": {"rope_type": "axial"}}, "rope type 'axial' is not one of default, linear"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "are not one set for all layers"),
        ({"rope_parameters": "yarn"}, "the rope parameters 'yarn' are not one set"),
        ({"rope_parameters": "absent", "rope_theta": 0}, r"RopeConfig\.theta must be above 0, got 0"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers must be of type int, got '2'"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\]; known: llama"),
        ({"eos_token_id": [1, "x"]}, r"eos_token_id must be of type int, got \[1, 'x'\]"),
        ({"num_attention_heads": None}, "num_attention_heads must be of type int, got None"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be of type float, got '1e-5'"),
        ({"tie_word_embeddings": 2}, "tie_word_embeddings must be of type bool, got 2"),
        ({"rope_scaling": {"type": "linear"}}, "rope type linear needs factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "llama3 lacks low_freq_factor, high_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"hidden_act": "selu"}, "hidden_act 'selu' is not one of silu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ({"num_attention_heads": 5, "head_dim": None}, "not a multiple of num_heads"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8},
            "only some have a sliding window",
        ),
    ],
)
def test_settings_that_cannot_be_reproduced_are_refused(tmp_path: Path, raw: dict, words: str) -> None:
    with pytest.raises(InteropError, match=words):
        edited(tmp_path, **raw)


@pytest.mark.parametrize(
    "change",
    [
        {"out_bias": True},
        {"qkv_bias": True, "mlp_bias": True},
        {"qk_norm": True, "mlp_bias": True},
        {"sliding_window": 8, "qkv_bias": True, "out_bias": True},
        {"d_model": 25},
    ],
)
def test_combinations_transformers_lacks_are_not_exported(tmp_path: Path, change: dict) -> None:
    config = dataclasses.replace(TINY, **change)
    with pytest.raises(InteropError, match=r"no architecture of transformers has|multiple of num_heads"):
        jaxllm.save_hf(tmp_path, build(config), random_params(config))
