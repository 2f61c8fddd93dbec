"""T5, mT5 and UMT5 of transformers (v1.1, Flan, UL2 and ByT5 are T5): names of tensors, and config.json both ways.

The meaning of config.json for the head changed twice. transformers 4.x reads tie_word_embeddings: false as "own head,
no scaling" (v1.1). 5.x calls every model tied, keeps the scaling in scale_decoder_outputs, and prefers a head in the
file that differs. Here the scaling comes from the newer key where it exists, and the tie from the file alone.
Out of scope: reading files.
"""

from typing import Any

from jaxllm.config import T5Config
from jaxllm.interop import ACTIVATIONS, InteropError
from jaxllm.interop.safetensors_dir import Entry, TensorFiles

# What each architecture assumes for keys that config.json leaves out (transformers' documented defaults).
_T5: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_decoder_layers": None,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "initializer_factor": 1.0,
    "feed_forward_proj": "relu",
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_MT5 = _T5 | {"vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu"}
DEFAULTS = {"t5": _T5, "mt5": _MT5, "umt5": _MT5}

_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_HEAD = "lm_head.weight"
# Copies of the one embedding, and a table of the oldest files that no code ever read.
IGNORED = (
    r"shared\.weight|(encoder|decoder)\.embed_tokens\.weight|lm_head\.weight",
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
)

# Settings that at most change their name, ours: theirs.
_SETTINGS = {
    **{name: name for name in ("vocab_size", "d_model", "d_ff", "num_layers", "num_heads", "dropout_rate")},
    "head_dim": "d_kv",
    "relative_buckets": "relative_attention_num_buckets",
    "relative_max_distance": "relative_attention_max_distance",
    "norm_eps": "layer_norm_epsilon",
    "init_factor": "initializer_factor",
}
_TABLE = "layer.0.SelfAttention.relative_attention_bias.weight"


def entries(config: T5Config) -> list[Entry]:
    """Every parameter and the tensor it is stored in."""
    found = [Entry(("embed",), _EMBEDDINGS[0])]
    if not config.tie_embeddings:
        found.append(Entry(("lm_head",), _HEAD))
    elif not config.scale_logits:
        found.append(Entry(("embed",), _HEAD))  # a copy: 4.x does not scale only where the head is its own
    attention, cross = ("attention", "attn_norm", "SelfAttention"), ("cross_attention", "cross_norm", "EncDecAttention")
    for stack, layers, parts in (
        ("encoder", config.num_layers, (attention,)),
        ("decoder", config.num_decoder_layers, (attention, cross)),
    ):
        found.append(Entry((stack, "final_norm", "weight"), f"{stack}.final_layer_norm.weight"))
        if config.relative_per_layer:
            found.append(Entry((stack, "layers", "relative_bias"), f"{stack}.block.{{}}.{_TABLE}", layers))
        else:
            found.append(Entry((stack, "relative_bias"), f"{stack}.block.0.{_TABLE}"))
        for i, (ours, norm, theirs) in enumerate(parts):
            stem, path = f"{stack}.block.{{}}.layer.{i}", (stack, "layers")
            found.append(Entry((*path, norm, "weight"), f"{stem}.layer_norm.weight", layers))
            for letter in "qkvo":
                tensor = f"{stem}.{theirs}.{letter}.weight"
                found.append(Entry((*path, ours, f"{letter}_proj", "kernel"), tensor, layers, transposed=True))
        stem = f"{stack}.block.{{}}.layer.{len(parts)}"
        found.append(Entry((stack, "layers", "mlp_norm", "weight"), f"{stem}.layer_norm.weight", layers))
        inner = {"gate_proj": "wi_0", "up_proj": "wi_1"} if config.gated else {"up_proj": "wi"}
        for name, theirs in (inner | {"down_proj": "wo"}).items():
            tensor = f"{stem}.DenseReluDense.{theirs}.weight"
            found.append(Entry((stack, "layers", "mlp", name, "kernel"), tensor, layers, transposed=True))
    return found


def read_config(value: dict[str, Any], files: TensorFiles) -> T5Config:
    """Our config of a config.json with defaults; InteropError for a setting that our model cannot reproduce.

    `files` decide whether the head is tied.
    """
    tied = _tied(files)
    scaled = _scaled(value, tied=tied)
    if tied and not scaled and _HEAD not in files.info:
        files.alias(_HEAD, _EMBEDDINGS[0])
    gated, activation = _feed_forward(value)
    return T5Config(
        **{ours: value[theirs] for ours, theirs in _SETTINGS.items()},
        num_decoder_layers=value["num_decoder_layers"] or 0,
        relative_per_layer=value["model_type"] == "umt5",
        activation=activation,
        gated=gated,
        tie_embeddings=tied,
        scale_logits=scaled,
        decoder_start_id=value.get("decoder_start_token_id") or 0,
    )


def write_config(config: T5Config) -> dict[str, Any]:
    """A config.json of this config; InteropError where some version of transformers would read another model."""
    if config.scale_logits and not config.tie_embeddings:
        raise InteropError(
            "got scale_logits without tie_embeddings; transformers 4.x scales logits only where it ties the "
            "embeddings. Multiply lm_head by d_model ** -0.5 and set scale_logits: false"
        )
    if config.gated and config.activation == "gelu":
        raise InteropError("transformers' gated-gelu is the tanh form; a gated MLP with activation: gelu has no name")
    kind = "umt5" if config.relative_per_layer else "t5"
    tanh = "gelu" if config.gated else "gelu_new"  # gated-gelu is the tanh form
    word = tanh if config.activation == "gelu_tanh" else config.activation
    return {
        "model_type": kind,
        "architectures": [f"{kind.upper()}ForConditionalGeneration"],
        "is_encoder_decoder": True,
        **{theirs: getattr(config, ours) for ours, theirs in _SETTINGS.items()},
        "num_decoder_layers": config.num_decoder_layers,
        "feed_forward_proj": f"gated-{word}" if config.gated else word,
        "decoder_start_token_id": config.decoder_start_id,
        "tie_word_embeddings": config.scale_logits,
        "scale_decoder_outputs": config.scale_logits,
    }


def _tied(files: TensorFiles) -> bool:
    """Whether the head is the embedding, whose tensor is named `shared.weight` from here on."""
    found = [name for name in _EMBEDDINGS if name in files.info]
    if not found and _HEAD in files.info:
        found = [_HEAD]  # of a tied model, saved under one of its names
    if found and found[0] != _EMBEDDINGS[0]:
        files.alias(_EMBEDDINGS[0], found[0])
    for copy in found[1:]:
        if not files.same(found[0], copy):
            raise InteropError(f"{copy} differs from {found[0]}; T5's two stacks share one embedding")
    return _HEAD not in files.info or (bool(found) and files.same(found[0], _HEAD))


def _scaled(value: dict[str, Any], *, tied: bool) -> bool:
    """Whether the decoder's output is multiplied by d_model ** -0.5 before the head.

    mT5 has no scaling, and UMT5 was trained without. But transformers 5.0 to 5.23 scaled UMT5, and wrote
    tie_word_embeddings: true for files with a separate head. Without the newer key, it counts only for a tied head.
    """
    if value["model_type"] == "mt5":
        return False
    if "scale_decoder_outputs" in value:
        return bool(value["scale_decoder_outputs"])
    if value["model_type"] == "umt5":
        return tied and bool(value.get("tie_word_embeddings", False))
    return value.get("tie_word_embeddings") is not False


def _feed_forward(value: dict[str, Any]) -> tuple[bool, Any]:
    """Gated or not, and our name of the activation; other keys of config.json may repeat both."""
    *gate, name = value["feed_forward_proj"].split("-")
    if gate not in ([], ["gated"]):
        raise InteropError(f"feed_forward_proj {value['feed_forward_proj']!r} is neither `gated-X` nor `X`")
    # "gated-gelu" means the tanh form in every family; plain "gelu" is the exact one.
    name = "gelu_new" if value["feed_forward_proj"] == "gated-gelu" else name
    name = value.get("dense_act_fn") or name
    if name not in ACTIVATIONS:
        raise InteropError(f"activation {name!r} is not one of {', '.join(ACTIVATIONS)}")
    if value.get("is_gated_act", bool(gate)) != bool(gate):
        raise InteropError(f"is_gated_act contradicts feed_forward_proj {value['feed_forward_proj']!r}")
    return bool(gate), ACTIVATIONS[name]
