"""The settings of a model: all that it receives, and all that is needed to read a checkpoint."""

from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal

from jaxllm.config.setting import at_least, below, positive, require, settings

Objective = Literal["causal", "prefix_lm", "span_corruption", "ul2", "seq2seq"]
Activation = Literal["silu", "gelu_tanh", "gelu", "relu"]
RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]

# Settings that families share, with their meaning.
Layers = Annotated[Literal["scan", "unroll"], "scan compiles one layer; unroll compiles all and runs faster"]
Remat = Annotated[
    Literal["none", "elementwise", "dots", "full"], "what the backward pass recomputes; dots: all but matmuls"
]
Attention = Annotated[
    Literal["auto", "reference", "chunked", "cudnn"], "auto picks a kernel by platform and shape and logs it"
]


@settings
class RopeConfig:
    """Rotary position embedding: base and length extension (names of transformers' rope_parameters)."""

    type: Annotated[RopeType, "how the trained context is stretched; default does not stretch it"] = "default"
    theta: Annotated[float, positive, "base of the geometric series of wavelengths"] = 10000.0
    factor: Annotated[float | None, at_least(1), "context stretch; null derives it (yarn, longrope)"] = None
    original_max_length: Annotated[int | None, "context before stretching; null means the model's max_length"] = None
    low_freq_factor: Annotated[float, "llama3: wavelengths beyond original/low are fully interpolated"] = 1.0
    high_freq_factor: Annotated[float, "llama3: wavelengths below original/high are left alone"] = 4.0
    beta_fast: Annotated[float, "yarn: rotations above which a dimension is left alone"] = 32.0
    beta_slow: Annotated[float, "yarn: rotations below which a dimension is fully interpolated"] = 1.0
    truncate: Annotated[bool, "yarn: round the ramp's ends to whole dimensions"] = True
    mscale: Annotated[float | None, "yarn: numerator of the attention scaling"] = None
    mscale_all_dim: Annotated[float | None, "yarn: denominator of the attention scaling"] = None
    attention_factor: Annotated[float | None, "yarn, longrope: multiplies cos and sin; null takes the formula"] = None
    short_factor: Annotated[tuple[float, ...], "longrope: divisor per dimension up to original_max_length"] = ()
    long_factor: Annotated[tuple[float, ...], "longrope: divisor per dimension beyond it"] = ()

    def __post_init__(self) -> None:
        if self.type in ("linear", "dynamic", "llama3"):
            require(self.factor is not None, f"rope type {self.type} needs factor, e.g. factor: 8.0")
        if self.type == "llama3":
            low, high = self.low_freq_factor, self.high_freq_factor
            require(high > low, f"rope high_freq_factor {high} must exceed low_freq_factor {low}")
        if self.type == "longrope":
            short, long = len(self.short_factor), len(self.long_factor)
            message = f"longrope needs head_dim / 2 short_factor and long_factor each, got {short} and {long}"
            require(short == long > 0, message)


class ModelConfig:
    """The facts and settings of a family that the rest of the library reads.

    A family's config class gives the facts, declares the settings and has the decorator `settings`.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]  # a family's class is a dataclass; this one has no fields
    encoder_decoder: ClassVar[bool]  # whether an encoder reads the inputs; otherwise there is only a decoder
    objectives: ClassVar[tuple[Objective, ...]]  # allowed values of `data.objective`
    absent_islands: ClassVar[frozenset[str]]  # names of `precision.islands` that the family does not have
    outgrows_float16: ClassVar[bool]  # whether a trained model's residual stream exceeds float16's range
    metric: ClassVar[str]  # name of the bits per byte of all text, or of the text that the decoder predicts

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
        """Settings in which a run may differ from its first checkpoint, besides those of every family."""
        return ()


@settings
class LlamaConfig(ModelConfig):
    """A Llama-shaped decoder (arXiv 2302.13971; GQA 2305.13245); flags cover Mistral, Qwen2 and Qwen3."""

    encoder_decoder: ClassVar[bool] = False
    objectives: ClassVar[tuple[Objective, ...]] = ("causal",)
    absent_islands: ClassVar[frozenset[str]] = frozenset({"relative_bias", "mlp_output"})
    outgrows_float16: ClassVar[bool] = False
    metric: ClassVar[str] = "bits_per_byte"

    family: Annotated[Literal["llama"], "name of this family"] = "llama"
    vocab_size: Annotated[int, at_least(1), "rows of the embedding; at least the tokenizer's size"]
    d_model: Annotated[int, at_least(1), "width of the residual stream"]
    d_ff: Annotated[int, at_least(1), "width of the gated MLP"]
    num_layers: Annotated[int, at_least(1), "decoder layers"]
    num_heads: Annotated[int, at_least(1), "query heads"]
    num_kv_heads: Annotated[int, at_least(0), "key/value heads, a divisor of num_heads; 0 means num_heads"] = 0
    head_dim: Annotated[int, at_least(0), "width of a head; 0 means d_model / num_heads"] = 0
    max_length: Annotated[int, at_least(1), "longest context of the model; RoPE scaling is relative to it"] = 2048
    rope: Annotated[RopeConfig, "rotary embedding, see rope.*"] = field(default_factory=RopeConfig)
    norm_eps: Annotated[float, "epsilon inside RMSNorm's square root"] = 1e-5
    tie_embeddings: Annotated[bool, "use the input embedding as output head"] = False
    qkv_bias: Annotated[bool, "bias on q, k and v (Qwen2)"] = False
    out_bias: Annotated[bool, "bias on the attention output"] = False
    mlp_bias: Annotated[bool, "bias on the three MLP projections"] = False
    qk_norm: Annotated[bool, "RMSNorm over each head of q and k (Qwen3)"] = False
    sliding_window: Annotated[int | None, at_least(1), "last positions attended to (Mistral); null: all"] = None
    activation: Annotated[Activation, "gate of the MLP"] = "silu"
    init_std: Annotated[float, "standard deviation of initial weights"] = 0.02
    layers: Layers = "scan"
    remat: Remat = "none"
    attention: Attention = "auto"

    def __post_init__(self) -> None:
        if self.num_kv_heads == 0:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.head_dim == 0:
            message = f"d_model {self.d_model} is not a multiple of num_heads {self.num_heads}"
            require(self.d_model % self.num_heads == 0, f"{message}; change one or set head_dim")
            object.__setattr__(self, "head_dim", self.d_model // self.num_heads)
        message = f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
        most = min(self.num_heads, max(self.num_kv_heads, 1))
        divisor = max(d for d in range(1, most + 1) if self.num_heads % d == 0)
        require(divisor == self.num_kv_heads, f"{message}; use a divisor such as {divisor}")
        message = f"head_dim must be even for RoPE's pairs, got {self.head_dim}; use {self.head_dim + 1}"
        require(self.head_dim % 2 == 0, message)
        if self.rope.type == "longrope":
            wanted, found = self.head_dim // 2, len(self.rope.long_factor)
            require(found == wanted, f"longrope factors need head_dim / 2 = {wanted} numbers, got {found}")
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


@settings
class T5Config(ModelConfig):
    """A T5 encoder-decoder (arXiv 1910.10683; gated MLP 2002.05202); flags cover v1.0, v1.1, mT5, UMT5, ByT5."""

    encoder_decoder: ClassVar[bool] = True
    objectives: ClassVar[tuple[Objective, ...]] = ("span_corruption", "ul2", "prefix_lm", "seq2seq")
    absent_islands: ClassVar[frozenset[str]] = frozenset({"rope"})
    outgrows_float16: ClassVar[bool] = True
    metric: ClassVar[str] = "bits_per_target_byte"

    family: Annotated[Literal["t5"], "name of this family"] = "t5"
    vocab_size: Annotated[int, at_least(1), "rows of the embedding; may exceed the tokenizer's (32128 against 32100)"]
    d_model: Annotated[int, at_least(1), "width of the residual stream"]
    d_ff: Annotated[int, at_least(1), "width of the MLP"]
    num_layers: Annotated[int, at_least(1), "encoder layers"]
    num_decoder_layers: Annotated[int, at_least(0), "decoder layers; 0 means num_layers"] = 0
    num_heads: Annotated[int, at_least(1), "attention heads"]
    head_dim: Annotated[int, at_least(1), "width of a head (d_kv); num_heads * head_dim need not equal d_model"] = 64
    relative_buckets: Annotated[
        int, at_least(4), "rows of the relative position bias table; the encoder does not use an odd last row"
    ] = 32
    relative_max_distance: Annotated[int, "distance from which all positions share the last bucket"] = 128
    relative_per_layer: Annotated[bool, "a bias table in every layer (UMT5) instead of one per stack"] = False
    norm_eps: Annotated[float, "epsilon inside RMSNorm's square root"] = 1e-6
    activation: Annotated[Activation, "activation of the MLP; the gated-gelu of checkpoints is gelu_tanh"] = "gelu_tanh"
    gated: Annotated[bool, "gated MLP with two input projections (v1.1) or a plain one (v1.0)"] = True
    tie_embeddings: Annotated[bool, "use the input embedding as output head (v1.0)"] = False
    scale_logits: Annotated[bool, "multiply the decoder's output by d_model ** -0.5 before the head (v1.0)"] = False
    dropout_rate: Annotated[float, at_least(0), below(1), "rate of dropout at all of T5's places; 0 turns it off"] = 0.0
    decoder_start_id: Annotated[int, at_least(0), "first decoder input, normally the pad id"] = 0
    init_factor: Annotated[float, positive, "multiplies every initial standard deviation"] = 1.0
    layers: Layers = "scan"
    remat: Remat = "none"
    attention: Attention = "auto"

    def __post_init__(self) -> None:
        if self.num_decoder_layers == 0:
            object.__setattr__(self, "num_decoder_layers", self.num_layers)
        distance, exact = self.relative_max_distance, self.relative_buckets // 2
        message = f"relative_max_distance {distance} must exceed relative_buckets / 2 = {exact}"
        require(distance > exact, f"{message}, where the logarithmic buckets start")
        start, size = self.decoder_start_id, self.vocab_size
        require(start < size, f"decoder_start_id {start} is outside the vocabulary of {size}")


# The config class of each family, by its name in files; `jaxllm.models.family` has the rest of a family.
MODEL_CONFIGS: dict[str, type[ModelConfig]] = {"llama": LlamaConfig, "t5": T5Config}
