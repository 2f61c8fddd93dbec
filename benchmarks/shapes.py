"""The shapes of models that benchmarks run: small ones for a CPU, real ones for a GPU, and toys."""

import dataclasses
from typing import Any

from jaxllm.config import LlamaConfig, ModelConfig, RopeConfig, T5Config

_A: dict[str, Any] = {"vocab_size": 8192, "d_model": 256, "d_ff": 688, "num_layers": 4, "num_heads": 8}
_TOY: dict[str, Any] = {"vocab_size": 512, "d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 4}
_LLAMA3: dict[str, Any] = {"rope": RopeConfig(theta=500_000.0), "max_length": 8192, "vocab_size": 128_256}
_8B: dict[str, Any] = {"d_model": 4096, "d_ff": 14_336, "num_heads": 32, "num_kv_heads": 8, **_LLAMA3}
_UNROLLED: dict[str, ModelConfig] = {
    "A": LlamaConfig(**_A, num_kv_heads=4),
    "B": LlamaConfig(vocab_size=32_000, d_model=512, d_ff=1376, num_layers=8, num_heads=8, num_kv_heads=4),
    "TA": T5Config(**_A, head_dim=32),
    "toy": LlamaConfig(**_TOY, num_kv_heads=2),
    "toy_t5": T5Config(**_TOY, head_dim=16),
    "1b": LlamaConfig(
        d_model=2048, d_ff=8192, num_layers=16, num_heads=32, num_kv_heads=8, tie_embeddings=True, **_LLAMA3
    ),
    "8b": LlamaConfig(num_layers=32, **_8B),
    "8b_8layers": LlamaConfig(num_layers=8, **_8B),
    "t5_base": T5Config(vocab_size=32_128, d_model=768, d_ff=2048, num_layers=12, num_heads=12),
    "t5_large": T5Config(vocab_size=32_128, d_model=1024, d_ff=2816, num_layers=24, num_heads=16),
}
SHAPES = {name: dataclasses.replace(config, layers="unroll") for name, config in _UNROLLED.items()}
# What a dry run takes instead, as far as the family has the field.
_SMALL = {"vocab_size": 384, "d_model": 32, "d_ff": 48, "num_layers": 1, "num_heads": 4, "head_dim": 8}
_SMALL |= {"num_kv_heads": 2, "num_decoder_layers": 1}


def shape(name: str, *, toy: bool, **changes: Any) -> Any:
    """A shape by name; a toy keeps the family and what is special about it."""
    config = dataclasses.replace(SHAPES[name], **changes)
    if not toy:
        return config
    fields = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{key: value for key, value in _SMALL.items() if key in fields})
