"""The settings of a model: all that it receives, and all that a checkpoint needs to be read again.

Out of scope: the settings of a run (`jaxllm.config`, where these can be imported from too).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from os import PathLike
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

Layers = Literal["scan", "unroll"]
Remat = Literal["none", "elementwise", "dots", "full"]
Attention = Literal["auto", "reference", "chunked", "cudnn"]
Objective = Literal["causal", "prefix_lm", "span_corruption", "ul2", "seq2seq"]

# pydantic reads this from a standard dataclass: an unknown key is an error, an infinite number too.
STRICT: dict[str, Any] = {"extra": "forbid", "allow_inf_nan": False}


def require(condition: bool, message: str) -> None:
    """Raises ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def positive(owner: Any, *names: str) -> None:
    """Requires attributes above 0."""
    for name in names:
        value = getattr(owner, name)
        require(value > 0, f"{name} must be positive, got {value}; set it to at least 1")


def fraction(owner: Any, *names: str) -> None:
    """Requires attributes in [0, 1)."""
    for name in names:
        value = getattr(owner, name)
        require(0 <= value < 1, f"{name} must lie in [0, 1), got {value}")


_hints = functools.lru_cache(get_type_hints)


# NumPy's numbers are numbers too, and a path may be given as one.
_ACCEPTED: dict[Any, tuple[type, ...]] = {int: (Integral,), float: (Real,), str: (str, PathLike)}


def typed(owner: Any) -> None:
    """Requires of each field the type it is declared with, as pydantic does for a config that comes from a file."""
    hints = _hints(type(owner))
    for name in (item.name for item in fields(owner)):
        hint, value = hints[name], getattr(owner, name)
        if get_origin(hint) is Literal:
            known = get_args(hint)
            require(value in known, f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")
            continue
        kinds: tuple[Any, ...] = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        accepted: list[Any] = [_ACCEPTED.get(kind, get_origin(kind) or kind) for kind in kinds]
        fits = any(isinstance(value, kind) for kind in accepted)
        if isinstance(value, bool):  # an int to Python
            fits = bool in kinds
        names = " or ".join("None" if kind is NoneType else getattr(kind, "__name__", str(kind)) for kind in kinds)
        require(fits, f"{name} must be of type {names}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: base and length extension (names of transformers' rope_parameters).

    Attributes:
        type: default, linear, dynamic, llama3, yarn or longrope.
        theta: base of the geometric series of wavelengths.
        factor: by how much the trained context is stretched; null lets yarn and longrope derive it.
        original_max_length: context length before stretching; null means the model's max_length.
        low_freq_factor: llama3, wavelengths beyond original/low are fully interpolated.
        high_freq_factor: llama3, wavelengths below original/high are left alone.
        beta_fast: yarn, rotations above which a dimension is left alone.
        beta_slow: yarn, rotations below which a dimension is fully interpolated.
        truncate: yarn, round the ramp's ends to whole dimensions.
        mscale: yarn, numerator of the attention scaling.
        mscale_all_dim: yarn, denominator of the attention scaling.
        attention_factor: yarn and longrope, multiplies cos and sin; null takes the formula.
        short_factor: longrope, divisor per dimension up to original_max_length.
        long_factor: longrope, divisor per dimension beyond it.
    """

    __pydantic_config__ = STRICT

    type: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default"
    theta: float = 10000.0
    factor: float | None = None
    original_max_length: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        known = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
        require(self.type in known, f"rope type must be one of {', '.join(known)}, got {self.type!r}")
        typed(self)
        require(self.theta > 0, f"rope theta must be positive, got {self.theta}")
        if self.type in ("linear", "dynamic", "llama3"):
            require(self.factor is not None, f"rope type {self.type} needs factor, e.g. factor: 8.0")
        if self.factor is not None:
            require(self.factor >= 1, f"rope factor must be at least 1, got {self.factor}")
        if self.type == "llama3":
            require(
                self.high_freq_factor > self.low_freq_factor,
                f"rope high_freq_factor {self.high_freq_factor} must exceed low_freq_factor {self.low_freq_factor}",
            )
        if self.type == "longrope":
            require(
                bool(self.short_factor) and len(self.short_factor) == len(self.long_factor),
                f"longrope needs short_factor and long_factor of the same length (head_dim / 2), got "
                f"{len(self.short_factor)} and {len(self.long_factor)}",
            )


class ModelConfig:
    """What the rest of the library reads of every family's settings; a family's config class is a frozen dataclass.

    Attributes:
        encoder_decoder: whether an encoder reads the inputs; a decoder alone otherwise.
        objectives: what `data.objective` may be.
        absent_islands: names of `precision.islands` that the family does not have.
        outgrows_float16: whether a trained model's residual stream exceeds float16's range.
        metric: name of the bits per byte of text: of all of it, or of the part that the decoder predicts.
        vocab_size: rows of the embedding.
        d_model: width of the residual stream.
        num_layers: layers of the decoder, or of the encoder.
        layers: scan or unroll.
        remat: what the backward pass recomputes.
        attention: implementation of the attention.
        decoder_start_id: first decoder input of an encoder-decoder.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]  # a family's class is a dataclass; this one has no fields
    encoder_decoder: ClassVar[bool]
    objectives: ClassVar[tuple[Objective, ...]]
    absent_islands: ClassVar[frozenset[str]]
    outgrows_float16: ClassVar[bool]
    metric: ClassVar[str]

    family: str
    vocab_size: int
    d_model: int
    num_layers: int
    layers: Layers
    remat: Remat
    attention: Attention
    decoder_start_id: int

    @property
    def context(self) -> int | None:
        """The longest row that the model is made for, None without a limit."""
        return None

    @property
    def resizable(self) -> tuple[str, ...]:
        """Settings in which a run may differ from the checkpoint that it starts from, besides those of every family."""
        return ()


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """A Llama-shaped decoder (arXiv 2302.13971; GQA 2305.13245); flags cover Mistral, Qwen2 and Qwen3.

    Attributes:
        family: llama.
        vocab_size: rows of the embedding; at least the tokenizer's size.
        d_model: width of the residual stream.
        d_ff: width of the gated MLP.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key/value heads, a divisor of num_heads; 0 means num_heads.
        head_dim: width of a head; 0 means d_model / num_heads.
        max_length: longest context the model is made for; RoPE scaling is relative to it.
        rope: rotary embedding, see rope.*.
        norm_eps: epsilon inside RMSNorm's square root.
        tie_embeddings: use the input embedding as output head.
        qkv_bias: bias on q, k and v (Qwen2).
        out_bias: bias on the attention output.
        mlp_bias: bias on the three MLP projections.
        qk_norm: RMSNorm over each head of q and k (Qwen3).
        sliding_window: attend to this many last positions only (Mistral); null attends to all.
        activation: gate of the MLP.
        init_std: standard deviation of initial weights.
        layers: scan compiles one layer once; unroll compiles all of them and runs faster. Same result.
        remat: what the backward pass recomputes: none, elementwise, dots (all but matmuls) or full.
        attention: auto picks a kernel by platform and shape and logs its name once.
    """

    __pydantic_config__ = STRICT
    encoder_decoder: ClassVar[bool] = False
    objectives: ClassVar[tuple[Objective, ...]] = ("causal",)
    absent_islands: ClassVar[frozenset[str]] = frozenset({"relative_bias", "mlp_output"})
    outgrows_float16: ClassVar[bool] = False
    metric: ClassVar[str] = "bits_per_byte"

    family: Literal["llama"] = "llama"
    vocab_size: int
    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    num_kv_heads: int = 0
    head_dim: int = 0
    max_length: int = 2048
    rope: RopeConfig = field(default_factory=RopeConfig)
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    activation: Literal["silu", "gelu_tanh", "gelu", "relu"] = "silu"
    init_std: float = 0.02
    layers: Layers = "scan"
    remat: Remat = "none"
    attention: Attention = "auto"

    def __post_init__(self) -> None:
        typed(self)
        positive(self, "vocab_size", "d_model", "d_ff", "num_layers", "num_heads", "max_length")
        if self.num_kv_heads == 0:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.head_dim == 0:
            require(
                self.d_model % self.num_heads == 0,
                f"d_model {self.d_model} is not a multiple of num_heads {self.num_heads}; change one or set head_dim",
            )
            object.__setattr__(self, "head_dim", self.d_model // self.num_heads)
        positive(self, "num_kv_heads", "head_dim")
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; "
            f"use a divisor such as {_largest_divisor(self.num_heads, self.num_kv_heads)}",
        )
        require(
            self.head_dim % 2 == 0,
            f"head_dim must be even for RoPE's pairs, got {self.head_dim}; use {self.head_dim + 1}",
        )
        if self.sliding_window is not None:
            positive(self, "sliding_window")
        if self.rope.type == "longrope":
            require(
                len(self.rope.long_factor) == self.head_dim // 2,
                f"longrope factors need head_dim / 2 = {self.head_dim // 2} numbers, got {len(self.rope.long_factor)}",
            )
        if self.rope.type == "dynamic":
            require(self.head_dim > 2, "dynamic RoPE divides by head_dim - 2; use a head_dim above 2")

    @property
    def context(self) -> int:
        """See `ModelConfig`."""
        return self.max_length

    @property
    def resizable(self) -> tuple[str, ...]:
        """See `ModelConfig`; the other types of RoPE stretch relative to the context."""
        return ("max_length",) if self.rope.type in ("default", "linear") else ()


@dataclass(frozen=True, kw_only=True)
class T5Config(ModelConfig):
    """A T5 encoder-decoder (arXiv 1910.10683; gated MLP 2002.05202); flags cover v1.0, v1.1, mT5, UMT5, ByT5.

    Attributes:
        family: t5.
        vocab_size: rows of the embedding; may exceed the tokenizer's size (32128 against 32100).
        d_model: width of the residual stream.
        d_ff: width of the MLP.
        num_layers: encoder layers.
        num_decoder_layers: decoder layers; 0 means num_layers.
        num_heads: attention heads.
        head_dim: width of a head (d_kv); num_heads * head_dim need not equal d_model.
        relative_buckets: rows of the relative position bias table; of an odd number the encoder leaves the last unused.
        relative_max_distance: distance from which all positions share the last bucket.
        relative_per_layer: a bias table in every layer (UMT5) instead of one per stack.
        norm_eps: epsilon inside RMSNorm's square root.
        activation: of the MLP; gelu_tanh is what every gated checkpoint means by gated-gelu.
        gated: gated MLP with two input projections (v1.1) or a plain one (v1.0).
        tie_embeddings: use the input embedding as output head (v1.0).
        scale_logits: multiply the decoder's output by d_model ** -0.5 before the head (v1.0).
        dropout_rate: at all of T5's places; 0 turns it off.
        decoder_start_id: first decoder input, normally the pad id.
        init_factor: multiplies every initial standard deviation.
        layers: scan compiles one layer once; unroll compiles all of them and runs faster. Same result.
        remat: what the backward pass recomputes: none, elementwise, dots (all but matmuls) or full.
        attention: auto picks a kernel by platform and shape and logs its name once.
    """

    __pydantic_config__ = STRICT
    encoder_decoder: ClassVar[bool] = True
    objectives: ClassVar[tuple[Objective, ...]] = ("span_corruption", "ul2", "prefix_lm", "seq2seq")
    absent_islands: ClassVar[frozenset[str]] = frozenset({"rope"})
    outgrows_float16: ClassVar[bool] = True
    metric: ClassVar[str] = "bits_per_target_byte"

    family: Literal["t5"] = "t5"
    vocab_size: int
    d_model: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int = 0
    num_heads: int
    head_dim: int = 64
    relative_buckets: int = 32
    relative_max_distance: int = 128
    relative_per_layer: bool = False
    norm_eps: float = 1e-6
    activation: Literal["silu", "gelu_tanh", "gelu", "relu"] = "gelu_tanh"
    gated: bool = True
    tie_embeddings: bool = False
    scale_logits: bool = False
    dropout_rate: float = 0.0
    decoder_start_id: int = 0
    init_factor: float = 1.0
    layers: Layers = "scan"
    remat: Remat = "none"
    attention: Attention = "auto"

    def __post_init__(self) -> None:
        typed(self)
        positive(self, "vocab_size", "d_model", "d_ff", "num_layers", "num_heads", "head_dim", "init_factor")
        if self.num_decoder_layers == 0:
            object.__setattr__(self, "num_decoder_layers", self.num_layers)
        positive(self, "num_decoder_layers")
        fraction(self, "dropout_rate")
        require(
            self.relative_buckets >= 4,
            f"relative_buckets must be at least 4, two in each direction, got {self.relative_buckets}; T5 uses 32",
        )
        require(
            self.relative_max_distance > self.relative_buckets // 2,
            f"relative_max_distance {self.relative_max_distance} must exceed relative_buckets / 2 = "
            f"{self.relative_buckets // 2}: the buckets beyond it would be logarithms of less than 1",
        )
        require(
            0 <= self.decoder_start_id < self.vocab_size,
            f"decoder_start_id {self.decoder_start_id} is outside the vocabulary of {self.vocab_size}",
        )


# The config class of each family, by the `family` that a file names; `jaxllm.models.family` has the rest of a family.
MODEL_CONFIGS: dict[str, type[ModelConfig]] = {"llama": LlamaConfig, "t5": T5Config}


def _largest_divisor(number: int, limit: int) -> int:
    return max(d for d in range(1, min(number, max(limit, 1)) + 1) if number % d == 0)
