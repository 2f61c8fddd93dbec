"""The T5-shaped models that parity is tested on: settings, weights from an integer hash, and our numbers for them.

Row 1 of a batch has padding in its source and targets that the loss leaves out, so that both masks are in every number.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxllm
from jaxllm.interop import t5
from jaxllm.models.t5 import decode as t5_decode
from tests.parity.llama_cases import GRADS, LOGITS, Numbers, grad_summary, logit_error, noise, tensors_of

__all__ = ["GRADS", "LOGITS", "Numbers", "grad_summary", "logit_error"]

SOURCE, TARGET, VOCAB, NEW = 24, 12, 61, 8
SOURCE_LENGTHS, TARGET_LENGTHS = (24, 15), (12, 9)
GOLDEN = Path(__file__).parent.parent / "golden" / "t5.npz"

_BASE = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "dropout_rate": 0.1,  # and yet no dropout: both sides evaluate
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": None,
}
_V11 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}

# name -> (model_type, what differs from _BASE)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "v1_0": ("t5", {}),
    "v1_0_eps_start": ("t5", {"layer_norm_epsilon": 1e-2, "decoder_start_token_id": 5, "feed_forward_proj": "gelu"}),
    "v1_1": ("t5", _V11),
    "ul2": ("t5", _V11 | {"feed_forward_proj": "gated-silu", "d_kv": 16, "num_heads": 2}),
    "byt5": ("t5", _V11 | {"vocab_size": 384, "num_layers": 3, "num_decoder_layers": 1, "d_kv": 12}),
    "deep_decoder": ("t5", _V11 | {"num_layers": 1, "num_decoder_layers": 3, "relative_attention_max_distance": 10}),
    "mt5": ("mt5", _V11 | {"d_kv": 12, "num_heads": 3}),
    "umt5": ("umt5", _V11),
}


def settings(name: str) -> dict[str, Any]:
    """Keyword arguments of the transformers config."""
    return {**_BASE, **CASES[name][1]}


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight of a size that keeps activations, scores and logits near 1, and norms far from their default."""
    u = noise(name, shape)
    if len(shape) == 1:
        return 1 + 0.3 * u
    if name == "shared.weight" or "relative_attention_bias" in name:
        return 1.5 * u
    return u * np.float32((1.0 if ".q." in name else 2.2) / shape[1] ** 0.5)


def source(vocab: int = VOCAB) -> np.ndarray:
    """Source ids [B, S]; 0 behind each row's length."""
    return _ids("source", vocab, SOURCE, SOURCE_LENGTHS)


def labels(vocab: int = VOCAB) -> np.ndarray:
    """Targets [B, T]; -100 behind each row's length."""
    return np.where(_inside(TARGET, TARGET_LENGTHS), _ids("target", vocab, TARGET, TARGET_LENGTHS), -100)


def source_mask() -> np.ndarray:
    """1 at real source tokens [B, S]."""
    return _inside(SOURCE, SOURCE_LENGTHS).astype(np.int32)


def decoder_tokens(start: int, vocab: int = VOCAB) -> np.ndarray:
    """The targets shifted right, as transformers makes them: the start id first, the padding id for -100."""
    kept = np.maximum(labels(vocab), 0)
    return np.concatenate([np.full((len(kept), 1), start), kept[:, :-1]], axis=1).astype(np.int32)


def _inside(length: int, lengths: tuple[int, ...]) -> np.ndarray:
    return np.arange(length)[None] < np.array(lengths)[:, None]


def _ids(name: str, vocab: int, length: int, lengths: tuple[int, ...]) -> np.ndarray:
    ids = 1 + (noise(name, (len(lengths), length)) * 0.5 + 0.5) * (vocab - 1)
    return np.where(_inside(length, lengths), ids, 0).astype(np.int32)


def write_directory(folder: Path, config: dict[str, Any], shapes: dict[str, Any]) -> None:
    """A Hugging Face directory without transformers: config.json as it wrote it, hashed weights."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: weight(name, tuple(shape)) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load_golden(name: str) -> dict[str, Any]:
    """What `tests/golden/make_t5.py` kept of transformers' results for a case."""
    with np.load(GOLDEN) as file:
        found = {key.split("/")[1]: file[key] for key in file.files if key.startswith(f"{name}/")}
    return {**found, **json.loads(str(found["about"]))}


def inputs(model: Any) -> tuple[Any, ...]:
    """Source, decoder tokens and the source's segment ids."""
    vocab = model.config.vocab_size
    return source(vocab), decoder_tokens(model.config.decoder_start_id, vocab), source_mask()


def our_logits(model: Any, params: Any, *, key: jax.Array | None = None) -> np.ndarray:
    """Logits [B, T, V] of the batch; with a key, as in training."""
    tokens, shifted, mask = inputs(model)
    run = jax.jit(lambda p, *x: model.apply({"params": p}, x[0], x[1], encoder_segment_ids=x[2], key=key))
    return np.asarray(run(params, tokens, shifted, mask))


def our_numbers(folder: Path) -> Numbers:
    """Logits, loss and gradients of the float32 model in a directory."""
    model, params = jaxllm.load_hf(folder)
    wanted = labels(model.config.vocab_size)

    def mean(p: Any, tokens: jax.Array, shifted: jax.Array, mask: jax.Array, targets: jax.Array) -> Any:
        logits = model.apply({"params": p}, tokens, shifted, encoder_segment_ids=mask)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(targets >= 0, nll, 0)) / jnp.sum(targets >= 0), logits

    run = jax.jit(jax.value_and_grad(mean, has_aux=True))
    (value, logits), grads = run(params, *inputs(model), wanted)
    return Numbers(np.asarray(logits), float(value), tensors_of(grads, t5.entries(model.config)))


def our_greedy(folder: Path) -> list[list[int]]:
    """Greedy continuations of the start id, through both caches."""
    model, params = jaxllm.load_hf(folder)
    c = model.config
    params = t5_decode.prepare_for_decode(params, dtype=jnp.float32)

    @jax.jit
    def run(params: Any, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        cross, cache = t5_decode.prefill(model, params, tokens, lengths, capacity=NEW)

        def step(carry: Any, position: jax.Array) -> Any:
            cache, last = carry
            places = jnp.full_like(last, position)
            logits, cache = t5_decode.decode_step(model, params, cross, cache, last, places)
            chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            return (cache, chosen), chosen

        start = jnp.full((tokens.shape[0],), c.decoder_start_id, jnp.int32)
        return jax.lax.scan(step, (cache, start), jnp.arange(NEW))[1].T

    return np.asarray(run(params, source(c.vocab_size), np.array(SOURCE_LENGTHS, np.int32))).tolist()
