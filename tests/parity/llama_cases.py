"""The Llama-shaped models that parity is tested on: settings, weights without any library, and our numbers for them.

Weights come from an integer hash, so that golden files hold results only and every machine makes the same model.
"""

from __future__ import annotations

import functools
import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

import jaxllm

BATCH, LENGTH, VOCAB = 2, 24, 61
PROMPT, NEW = 6, 8  # of greedy decoding
PICKS = 16  # entries of a gradient that a golden file keeps
GOLDEN = Path(__file__).parent.parent / "golden" / "llama.npz"

# float32 against transformers: largest error over the largest logit, or over the largest entry of a gradient.
LOGITS, GRADS = 2e-4, 2e-3
_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.0, 2.0, 4.5, 7.0],
    "factor": 4.0,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "original_max_position_embeddings": 16}

# name -> (model_type, what differs from _BASE)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mha": ("llama", {"num_key_value_heads": 4}),
    "gqa_tied_linear": (
        "llama",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 500000.0, "factor": 2.0},
        },
    ),
    "mqa_wide_heads_dynamic": (
        "llama",
        {
            "num_key_value_heads": 1,
            "head_dim": 12,
            "max_position_embeddings": 16,
            "hidden_act": "gelu_pytorch_tanh",
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
    "odd_heads_llama3": (
        "llama",
        {
            "hidden_size": 30,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, **_LLAMA3},
        },
    ),
    "odd_groups_narrow_heads": (
        "llama",
        {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 6, "rms_norm_eps": 1e-2},
    ),
    "biases_yarn_mscale": (
        "llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {**_YARN, "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.4, "beta_fast": 4.0},
        },
    ),
    "yarn_untruncated": (
        "llama",
        {"rope_parameters": {**_YARN, "factor": 4.0, "truncate": False, "attention_factor": 1.3}},
    ),
    "longrope_short": ("llama", {"rope_parameters": {**_LONG, "original_max_position_embeddings": 32}}),
    "longrope_long": ("llama", {"rope_parameters": {**_LONG, "original_max_position_embeddings": 16}}),
    "mistral": ("mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("qwen3", {"head_dim": 16, "num_key_value_heads": 1}),
}


class Numbers(NamedTuple):
    """What is compared.

    Attributes:
        logits: float32 [B, T, V].
        loss: mean cross-entropy of the next token.
        grads: of the loss, by tensor name of the Hugging Face file and in its layout.
    """

    logits: np.ndarray
    loss: float
    grads: dict[str, np.ndarray]


def settings(name: str) -> dict[str, Any]:
    """Keyword arguments of the transformers config."""
    return {**_BASE, **CASES[name][1]}


def noise(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform float32 in [-1, 1) from the splitmix64 hash of each element's index."""
    with np.errstate(over="ignore"):
        x = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()) << 20)
        x = x * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return ((x >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - 1).reshape(shape)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight of a size that keeps activations and logits near 1, biases and norms far from their defaults."""
    u = noise(name, shape)
    if name.endswith("bias"):
        return 0.3 * u
    if len(shape) == 1:
        return 1 + 0.3 * u
    if "embed_tokens" in name:
        return 0.1 * u  # so small that a wrong epsilon shows
    return u * np.float32(2.2 / shape[1] ** 0.5)


def tokens(name: str = "tokens", vocab: int = VOCAB) -> np.ndarray:
    """Ids [B, T], none of them the padding id 0."""
    return (1 + (noise(name, (BATCH, LENGTH)) * 0.5 + 0.5) * (vocab - 1)).astype(np.int32)


def write_directory(folder: Path, config: dict[str, Any], shapes: dict[str, Any]) -> None:
    """A Hugging Face directory without transformers: config.json as it wrote it, hashed weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: weight(name, tuple(shape)) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def tensors_of(tree: Any, entries: Any) -> dict[str, np.ndarray]:
    """A tree like the parameters as Hugging Face tensors."""
    found = {}
    for entry in entries:
        leaf = np.asarray(functools.reduce(lambda node, key: node[key], entry.path, tree), np.float32)
        leaf = leaf.swapaxes(-1, -2) if entry.transposed else leaf
        found.update(zip(entry.tensors(), leaf if entry.layers else [leaf], strict=True))
    return found


def load_golden(name: str) -> dict[str, Any]:
    """What `tests/golden/make_llama.py` kept of transformers' results for a case."""
    with np.load(GOLDEN) as file:
        found = {key.split("/")[1]: file[key] for key in file.files if key.startswith(f"{name}/")}
    return {**found, **json.loads(str(found["about"]))}


def grad_summary(name: str, grad: np.ndarray) -> np.ndarray:
    """Norm, largest entry and some entries of a gradient: what a golden file keeps of it."""
    picks = ((noise(f"{name} pick", (PICKS,)) * 0.5 + 0.5) * grad.size).astype(int)
    return np.array([np.linalg.norm(grad), np.abs(grad).max(), *grad.ravel()[picks]], np.float32)


def our_numbers(folder: Path) -> Numbers:
    """Logits, loss and gradients of the float32 model in a directory."""
    model, params = jaxllm.load_hf(folder)

    def mean(p: Any, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model.apply({"params": p}, ids)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1)
        return -jnp.mean(chosen), logits

    (value, logits), grads = jax.jit(jax.value_and_grad(mean, has_aux=True))(params, tokens())
    named = tensors_of(grads, jaxllm.interop.llama.entries(model.config))
    return Numbers(np.asarray(logits), float(value), named)


def logit_error(ours: Any, want: Any) -> float:
    """Largest difference, relative to the largest logit where that exceeds 1."""
    a, b = np.asarray(ours, np.float64), np.asarray(want, np.float64)
    return float(np.abs(a - b).max() / max(1.0, np.abs(b).max()))
