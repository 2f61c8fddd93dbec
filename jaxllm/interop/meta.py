"""Meta's original Llama layout to ours: params.json next to consolidated.NN files, one per model-parallel rank.

The slices of the ranks are joined here. q and k are stored for rotation of neighbouring pairs; rows are reordered into
the halves that we and Hugging Face rotate. Only torch pickles (.pth) need torch. All ranks are opened at once.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from jaxllm.config import LlamaConfig, RopeConfig
from jaxllm.interop import InteropError, weight_dtype
from jaxllm.interop.safetensors_dir import read_json
from jaxllm.models import Model, build

Tensors = Mapping[str, np.ndarray]

# Ours: Meta's name within a layer, and the axis of the file's [out, in] along which ranks are cut; None is a copy.
_KERNELS = {
    "q_proj": ("attention.wq", 0),
    "k_proj": ("attention.wk", 0),
    "v_proj": ("attention.wv", 0),
    "o_proj": ("attention.wo", 1),
    "gate_proj": ("feed_forward.w1", 0),
    "up_proj": ("feed_forward.w3", 0),
    "down_proj": ("feed_forward.w2", 1),
}
_NORMS = {"attn_norm": "attention_norm", "mlp_norm": "ffn_norm"}


def load_meta(path: str | Path, *, max_length: int | None = None, dtype: Any = None) -> tuple[Model, dict[str, Any]]:
    """The model and parameters of a directory in Meta's layout.

    Args:
        path: directory with params.json and consolidated files.
        max_length: context length, which params.json lacks. None is 131072 for scaled RoPE, 8192 for the RoPE base of
            Llama 3, and 2048 for the rest (Llama 2 was made for 4096).
        dtype: of the parameters; None keeps the files'.

    Raises:
        InteropError: for missing files or tensors, naming them.
    """
    folder = Path(path).expanduser()
    raw = read_json(folder / "params.json")
    files = sorted(folder.glob("consolidated*.pth")) or sorted(folder.glob("consolidated*.safetensors"))
    if not files:
        raise InteropError(f"{folder} holds no consolidated*.pth or consolidated*.safetensors")
    ranks = [_open(file) for file in files]
    embed = _join(ranks, "tok_embeddings.weight", None)
    config = _config(raw, ranks, vocab_size=embed.shape[0], max_length=max_length)
    if config.num_layers > len(ranks[0]):
        raise InteropError(f"n_layers of {folder / 'params.json'} is {config.num_layers}; {files[0].name} holds fewer")
    layers: dict[str, Any] = {}
    for ours, (name, axis) in _KERNELS.items():
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(ours, 0)
        stems = [f"layers.{i}.{name}" for i in range(config.num_layers)]
        layers[ours] = {"kernel": np.stack([halves(_join(ranks, f"{s}.weight", axis), heads).T for s in stems])}
        if f"{stems[0]}.bias" in ranks[0]:
            cut = 0 if axis == 0 else None
            layers[ours]["bias"] = np.stack([halves(_join(ranks, f"{s}.bias", cut), heads) for s in stems])
    for ours, name in _NORMS.items():
        weights = [ranks[0][f"layers.{i}.{name}.weight"] for i in range(config.num_layers)]
        layers[ours] = {"weight": np.stack(weights)}
    params = {"embed": embed, "layers": layers, "final_norm": {"weight": ranks[0]["norm.weight"]}}
    if not config.tie_embeddings:
        params["lm_head"] = _join(ranks, "output.weight", 0)
    kind = weight_dtype(embed.dtype if dtype is None else dtype)
    return build(config, dtype=kind), jax.tree.map(lambda leaf: jnp.asarray(leaf, kind), params)


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head, 2i and 2i+1 moved to i and i + H/2; nothing changes for heads = 0."""
    if not heads:
        return rows
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _open(path: Path) -> Tensors:
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        import torch
    except ImportError:
        raise InteropError(f"{path} is a torch pickle; reading it needs: pip install torch") from None
    tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return {
        name: tensor.view(torch.int16).numpy().view(jnp.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
        for name, tensor in tensors.items()
    }


def _join(ranks: Sequence[Tensors], name: str, axis: int | None) -> np.ndarray:
    try:
        parts = [rank[name] for rank in ranks]
    except KeyError:
        raise InteropError(f"a consolidated file lacks tensor {name}") from None
    if name == "tok_embeddings.weight":  # Llama 1 and 2 cut its columns, Llama 3 its rows
        axis = 1 if parts[0].shape[1] < ranks[0]["norm.weight"].shape[0] else 0
    return parts[0] if axis is None or len(parts) == 1 else np.concatenate(parts, axis=axis)


def _config(raw: dict[str, Any], ranks: Sequence[Tensors], *, vocab_size: int, max_length: int | None) -> LlamaConfig:
    first = ranks[0]
    theta = float(raw.get("rope_theta", 10000.0))
    rope = RopeConfig(theta=theta)
    longest = 8192 if theta >= 500000 else 2048
    if raw.get("use_scaled_rope"):
        factor = float(raw.get("rope_scaling_factor") or 8.0)
        high = float(raw.get("rope_high_freq_factor") or 4.0)
        rope = RopeConfig(type="llama3", theta=theta, factor=factor, high_freq_factor=high, original_max_length=8192)
        longest = 131072
    return LlamaConfig(
        vocab_size=vocab_size,
        d_model=raw["dim"],
        d_ff=len(ranks) * first["layers.0.feed_forward.w1.weight"].shape[0],
        num_layers=raw["n_layers"],
        num_heads=raw["n_heads"],
        num_kv_heads=raw.get("n_kv_heads") or raw["n_heads"],
        head_dim=raw.get("head_dim") or 0,
        max_length=max_length or longest,
        rope=rope,
        norm_eps=raw.get("norm_eps", 1e-5),
        tie_embeddings="output.weight" not in first,
        qkv_bias="layers.0.attention.wq.bias" in first,
        out_bias="layers.0.attention.wo.bias" in first,
        mlp_bias="layers.0.feed_forward.w1.bias" in first,
        sliding_window=raw.get("sliding_window"),
    )
