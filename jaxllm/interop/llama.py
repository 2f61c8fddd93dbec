"""Llama, Mistral, Qwen2 and Qwen3 of transformers: names of tensors, and config.json of 4.x and 5.x both ways.

One table of names; what differs between the four is which keys config.json may leave out and which flags they imply.
A setting that our model has no flag for is an error, never ignored. Out of scope: reading files.
"""

from __future__ import annotations

from typing import Any

from jaxllm.config import LlamaConfig, RopeConfig
from jaxllm.interop import InteropError
from jaxllm.interop.safetensors_dir import Entry, TensorFiles

# What each architecture assumes for keys that config.json leaves out (transformers' documented defaults).
_LLAMA: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_QWEN2 = _LLAMA | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "bos_token_id": None,
    "eos_token_id": None,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN2,
    "qwen3": _QWEN2 | {"head_dim": 128},
}
IGNORED = (r".*rotary_emb\.inv_freq", r"lm_head\.weight")  # a buffer of old files; a copy of the tied embedding

_ACTIVATIONS: dict[str, Any] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}

_ROPE_TYPES = {"su": "longrope"}  # Phi-3's first name for it
_ROPE_KEYS = {  # ours: theirs, as far as they only change name
    "factor": "factor",
    "original_max_length": "original_max_position_embeddings",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
    "attention_factor": "attention_factor",
    "short_factor": "short_factor",
    "long_factor": "long_factor",
}
_USED = {  # what each type reads, by our names
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "original_max_length", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        *("factor", "original_max_length", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": ("factor", "original_max_length", "attention_factor", "short_factor", "long_factor"),
}


def entries(config: LlamaConfig) -> list[Entry]:
    """Every parameter and the tensor it is stored in."""
    layers = config.num_layers
    found = [
        Entry(("embed",), "model.embed_tokens.weight"),
        Entry(("final_norm", "weight"), "model.norm.weight"),
    ]
    if not config.tie_embeddings:
        found.append(Entry(("lm_head",), "lm_head.weight"))
    norms = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if config.qk_norm:
        norms |= {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
    for ours, theirs in norms.items():
        found.append(Entry(("layers", ours, "weight"), f"model.layers.{{}}.{theirs}.weight", layers))
    for group, projections, biased in (
        ("self_attn", ("q_proj", "k_proj", "v_proj"), config.qkv_bias),
        ("self_attn", ("o_proj",), config.out_bias),
        ("mlp", ("gate_proj", "up_proj", "down_proj"), config.mlp_bias),
    ):
        for name in projections:
            stem = f"model.layers.{{}}.{group}.{name}"
            found.append(Entry(("layers", name, "kernel"), f"{stem}.weight", layers, transposed=True))
            if biased:
                found.append(Entry(("layers", name, "bias"), f"{stem}.bias", layers))
    return found


def read_config(raw: dict[str, Any], files: TensorFiles) -> LlamaConfig:
    """Our config of a config.json; `files` tell whether the head is tied.

    Raises:
        InteropError: for a setting that our model cannot reproduce.
    """
    kind = raw["model_type"]
    value = DEFAULTS[kind] | raw
    _refuse(value)
    heads = value["num_attention_heads"]
    return LlamaConfig(
        vocab_size=value["vocab_size"],
        d_model=value["hidden_size"],
        d_ff=value["intermediate_size"],
        num_layers=value["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=value["num_key_value_heads"] or heads,
        head_dim=value["head_dim"] or 0,
        max_length=value["max_position_embeddings"],
        rope=_read_rope(value),
        norm_eps=value["rms_norm_eps"],
        tie_embeddings=_tied(value, files),
        qkv_bias=kind == "qwen2" or (kind != "mistral" and bool(value["attention_bias"])),
        out_bias=kind in ("llama", "qwen3") and bool(value["attention_bias"]),
        mlp_bias=kind == "llama" and bool(value["mlp_bias"]),
        qk_norm=kind == "qwen3",
        sliding_window=_window(kind, value),
        activation=_ACTIVATIONS[value["hidden_act"]],
        init_std=value["initializer_range"],
    )


def write_config(config: LlamaConfig) -> dict[str, Any]:
    """A config.json that transformers 4.x and 5.x read as this config.

    Raises:
        InteropError: when no architecture of transformers has this combination of flags.
    """
    kind = _architecture(config)
    raw = {
        "model_type": kind,
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": _ACTIVATION_NAMES[config.activation],
        "max_position_embeddings": config.max_length,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    }
    if kind in ("llama", "qwen3"):
        raw["attention_bias"] = config.qkv_bias
    if kind == "llama":
        raw["mlp_bias"] = config.mlp_bias
    if kind == "mistral":
        raw["sliding_window"] = config.sliding_window
    if kind in ("qwen2", "qwen3"):
        raw |= {
            "use_sliding_window": config.sliding_window is not None,
            "sliding_window": config.sliding_window,
            "max_window_layers": 0,
        }
    return raw | _write_rope(config.rope)


def _architecture(config: LlamaConfig) -> str:
    if config.d_model % config.num_heads:
        raise InteropError(
            f"transformers demands d_model to be a multiple of num_heads even with head_dim, got {config.d_model} "
            f"and {config.num_heads}"
        )
    flags = (config.qkv_bias, config.out_bias, config.mlp_bias, config.qk_norm, config.sliding_window is not None)
    for kind, allowed in _FLAGS.items():
        if all(flag in options for flag, options in zip(flags, allowed, strict=True)) and (
            kind == "qwen2" or config.qkv_bias == config.out_bias
        ):
            return kind
    named = ("qkv_bias", "out_bias", "mlp_bias", "qk_norm", "sliding_window")
    raise InteropError(
        f"no architecture of transformers has {', '.join(f'{n}={f}' for n, f in zip(named, flags, strict=True))}; "
        f"llama has equal biases on qkv and out, mistral a window, qwen2 qkv_bias alone, qwen3 qk_norm without mlp_bias"
    )


# Which values of qkv_bias, out_bias, mlp_bias, qk_norm and a window each architecture can have.
_FREE, _NO, _YES = (False, True), (False,), (True,)
_FLAGS = {
    "llama": (_FREE, _FREE, _FREE, _NO, _NO),
    "mistral": (_NO, _NO, _NO, _NO, _YES),
    "qwen2": (_YES, _NO, _NO, _NO, _FREE),
    "qwen3": (_FREE, _FREE, _NO, _YES, _FREE),
}


def _refuse(value: dict[str, Any]) -> None:
    if value.get("quantization_config"):
        raise InteropError("quantization_config is set; only unquantised weights are read")
    if value["hidden_act"] not in _ACTIVATIONS:
        raise InteropError(f"hidden_act {value['hidden_act']!r} is not one of {', '.join(_ACTIVATIONS)}")


def _tied(value: dict[str, Any], files: TensorFiles) -> bool:
    """Tied when config.json says so, unless the file has a head of its own that differs (as transformers 5 decides)."""
    if not value["tie_word_embeddings"] or "lm_head.weight" not in files.info:
        return bool(value["tie_word_embeddings"])
    return files.same("lm_head.weight", "model.embed_tokens.weight")


def _window(kind: str, value: dict[str, Any]) -> int | None:
    if kind == "mistral":
        return value["sliding_window"]
    if kind == "llama" or not value["use_sliding_window"]:
        return None
    first, layers = value["max_window_layers"], value["num_hidden_layers"]
    # Names of every layer would be a list as long as config.json wants it.
    types = value.get("layer_types") or ["full_attention"] * (first > 0) + ["sliding_attention"] * (first < layers)
    if len(set(types)) > 1:
        raise InteropError(
            f"layers differ: only some have a sliding window (max_window_layers {first} of {layers}); a model here has "
            f"it in all layers or in none"
        )
    return value["sliding_window"] if types[0] == "sliding_attention" else None


def _read_rope(value: dict[str, Any]) -> RopeConfig:
    given = value.get("rope_scaling") or value.get("rope_parameters") or {}
    if not isinstance(given, dict) or any(isinstance(inner, dict) for inner in given.values()):
        raise InteropError(f"the rope parameters {given!r} are not one set for all layers")
    kind: Any = given.get("rope_type") or given.get("type") or "default"
    kind = _ROPE_TYPES.get(kind, kind)
    if kind not in _USED:
        raise InteropError(f"rope type {kind!r} is not one of {', '.join(_USED)}")
    partial = given.get("partial_rotary_factor", value.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise InteropError(f"partial_rotary_factor {partial} is not supported; heads are rotated whole")
    settings = {ours: given.get(_ROPE_KEYS[ours]) for ours in _USED[kind]}
    outer = value.get("original_max_position_embeddings")
    if outer is not None and "original_max_length" in settings:
        settings["original_max_length"] = outer  # Phi-3's place for it goes before the nested one
    needed = {"llama3": ("low_freq_factor", "high_freq_factor")}.get(kind, ())
    absent = [name for name in needed if settings[name] is None]
    if absent:
        raise InteropError(f"rope type {kind} lacks {', '.join(absent)}")
    theta = next((x for x in (given.get("rope_theta"), value.get("rope_theta")) if x is not None), 10000.0)
    return RopeConfig(
        type=kind, theta=float(theta), **{name: _tupled(v) for name, v in settings.items() if v is not None}
    )


def _write_rope(rope: RopeConfig) -> dict[str, Any]:
    settings = {_ROPE_KEYS[name]: _listed(getattr(rope, name)) for name in _USED[rope.type]}
    settings = {name: value for name, value in settings.items() if value is not None}
    nested = {"rope_type": rope.type, "rope_theta": rope.theta, **settings}
    # 4.x reads the first two, 5.x any of them; a rope_scaling that is there replaces rope_parameters in both.
    return {
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.type == "default" else nested,
        "rope_parameters": nested,
    }


def _tupled(value: Any) -> Any:
    return tuple(float(item) for item in value) if isinstance(value, list) else value


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
