"""Llama, Mistral, Qwen2 and Qwen3 of transformers: names of tensors, and config.json of 4.x and 5.x both ways.

The four differ only in the defaults of config.json and in the flags that they imply.
A setting without a flag in our model is an error. Out of scope: reading files.
"""

from typing import Any

from jaxllm.config import LlamaConfig, RopeConfig
from jaxllm.interop import ACTIVATIONS, InteropError
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
    | {"intermediate_size": 14336, "num_key_value_heads": 8}
    | {"max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": _QWEN2,
    "qwen3": _QWEN2 | {"head_dim": 128},
}
IGNORED = (r".*rotary_emb\.inv_freq", r"lm_head\.weight")  # a buffer of old files; a copy of the tied embedding

# Settings that only change their name, ours: theirs.
_SETTINGS = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_length": "max_position_embeddings",
    "init_std": "initializer_range",
    "norm_eps": "rms_norm_eps",
}
_ROPE_NAMES = {"original_max_length": "original_max_position_embeddings"}  # the only setting that changes its name
_ROPE_SETTINGS = {  # of each type, by our names
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
    found = [Entry(("embed",), "model.embed_tokens.weight"), Entry(("final_norm", "weight"), "model.norm.weight")]
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


def read_config(value: dict[str, Any], files: TensorFiles) -> LlamaConfig:
    """Our config of a config.json with defaults; InteropError for a setting that our model cannot reproduce.

    `files` decide whether the head is tied.
    """
    kind = value["model_type"]
    if value["hidden_act"] not in ACTIVATIONS:
        raise InteropError(f"hidden_act {value['hidden_act']!r} is not one of {', '.join(ACTIVATIONS)}")
    return LlamaConfig(
        **{ours: value[theirs] for ours, theirs in _SETTINGS.items()},
        num_kv_heads=value["num_key_value_heads"] or value["num_attention_heads"],
        head_dim=value["head_dim"] or 0,
        rope=_read_rope(value),
        tie_embeddings=_tied(value, files),
        qkv_bias=kind == "qwen2" or (kind != "mistral" and bool(value["attention_bias"])),
        out_bias=kind in ("llama", "qwen3") and bool(value["attention_bias"]),
        mlp_bias=kind == "llama" and bool(value["mlp_bias"]),
        qk_norm=kind == "qwen3",
        sliding_window=_window(kind, value),
        activation=ACTIVATIONS[value["hidden_act"]],
    )


def write_config(config: LlamaConfig) -> dict[str, Any]:
    """A config.json that transformers 4.x and 5.x read as this config; InteropError where no architecture has it."""
    kind, window = _architecture(config), config.sliding_window
    raw: dict[str, Any] = {"model_type": kind, "architectures": [f"{kind.capitalize()}ForCausalLM"]}
    raw |= {theirs: getattr(config, ours) for ours, theirs in _SETTINGS.items()} | {
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation),
        "tie_word_embeddings": config.tie_embeddings,
    }
    if kind in ("llama", "qwen3"):
        raw["attention_bias"] = config.qkv_bias
    if kind == "llama":
        raw["mlp_bias"] = config.mlp_bias
    else:
        raw["sliding_window"] = window
    if kind in ("qwen2", "qwen3"):
        raw |= {"use_sliding_window": window is not None, "max_window_layers": 0}
    return raw | _write_rope(config)


def _architecture(config: LlamaConfig) -> str:
    if config.d_model % config.num_heads:
        raise InteropError(
            f"transformers demands d_model to be a multiple of num_heads even with head_dim, got {config.d_model} "
            f"and {config.num_heads}"
        )
    flags = {name: getattr(config, name) not in (None, False) for name in _FLAG_NAMES}
    for kind, allowed in _FLAGS.items():
        possible = all(flag in options for flag, options in zip(flags.values(), allowed, strict=True))
        if possible and (kind == "qwen2" or config.qkv_bias == config.out_bias):
            return kind
    raise InteropError(
        f"no architecture of transformers has {', '.join(f'{name}={flag}' for name, flag in flags.items())}; "
        f"llama has equal biases on qkv and out, mistral a window, qwen2 qkv_bias alone, qwen3 qk_norm without mlp_bias"
    )


# Which values of these flags each architecture can have.
_FLAG_NAMES = ("qkv_bias", "out_bias", "mlp_bias", "qk_norm", "sliding_window")
_FREE, _NO, _YES = (False, True), (False,), (True,)
_FLAGS = {
    "llama": (_FREE, _FREE, _FREE, _NO, _NO),
    "mistral": (_NO, _NO, _NO, _NO, _YES),
    "qwen2": (_YES, _NO, _NO, _NO, _FREE),
    "qwen3": (_FREE, _FREE, _NO, _YES, _FREE),
}


def _tied(value: dict[str, Any], files: TensorFiles) -> bool:
    """As in config.json, unless the file has another head than the embedding (the rule of transformers 5)."""
    if not value["tie_word_embeddings"] or "lm_head.weight" not in files.info:
        return bool(value["tie_word_embeddings"])
    return files.same("lm_head.weight", "model.embed_tokens.weight")


def _window(kind: str, value: dict[str, Any]) -> int | None:
    if kind == "mistral":
        return value["sliding_window"]
    if kind == "llama" or not value["use_sliding_window"]:
        return None
    first, layers = value["max_window_layers"], value["num_hidden_layers"]
    # One name of each kind is enough: num_hidden_layers may be absurdly large.
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
    kind = "longrope" if kind == "su" else kind  # Phi-3's first name for it
    if kind not in _ROPE_SETTINGS:
        raise InteropError(f"rope type {kind!r} is not one of {', '.join(_ROPE_SETTINGS)}")
    partial = given.get("partial_rotary_factor", value.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise InteropError(f"partial_rotary_factor {partial} is not supported; heads are rotated whole")
    settings = {ours: given.get(_ROPE_NAMES.get(ours, ours)) for ours in _ROPE_SETTINGS[kind]}
    outer = value.get("original_max_position_embeddings")
    if outer is not None and "original_max_length" in settings:
        settings["original_max_length"] = outer  # Phi-3's place for it goes before the nested one
    needed = ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ()
    if absent := [name for name in needed if settings[name] is None]:
        raise InteropError(f"rope type {kind} lacks {', '.join(absent)}")
    theta = next((x for x in (given.get("rope_theta"), value.get("rope_theta")) if x is not None), 10000.0)
    for name, item in settings.items():
        if isinstance(item, list):
            settings[name] = tuple(map(float, item))
    return RopeConfig(type=kind, theta=float(theta), **{k: v for k, v in settings.items() if v is not None})


def _write_rope(config: LlamaConfig) -> dict[str, Any]:
    rope = config.rope
    settings = {_ROPE_NAMES.get(name, name): getattr(rope, name) for name in _ROPE_SETTINGS[rope.type]}
    settings = {name: value for name, value in settings.items() if value is not None}
    if rope.type == "yarn" and rope.factor is None:  # transformers demands it
        settings["factor"] = config.max_length / (rope.original_max_length or config.max_length)
    nested = {"rope_type": rope.type, "rope_theta": rope.theta, **settings}
    scaling = None if rope.type == "default" else nested
    # 4.x reads the first two, 5.x any of them; a rope_scaling that is there replaces rope_parameters in both.
    return {"rope_theta": rope.theta, "rope_scaling": scaling, "rope_parameters": nested}
