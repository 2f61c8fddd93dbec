"""The first sublayer that differs from transformers: `python -m benchmarks.parity DIR [--tolerance 1e-4]`.

Runs a Hugging Face directory of the Llama family through transformers and through this library, sublayer by sublayer.
Each of our layers takes the input of transformers' layer, so that an error appears only where it arises. Needs the
extra `parity` (torch and transformers). Out of scope: other families, gradients, decoding.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import LlamaConfig
from jaxllm.interop import InteropError
from jaxllm.interop.hf import load_hf, load_hf_config
from jaxllm.models import Model
from jaxllm.models.llama.model import LlamaLayer, whole_attention
from jaxllm.ops.pointwise import rms_norm
from jaxllm.ops.positions import apply_rope, rope_cos_sin, rope_frequencies

# Sublayers in order of execution: our name, transformers' module in a layer, and whether to compare its input.
_SUBLAYERS = (
    ("attn_norm", "input_layernorm", False),
    ("q_proj", "self_attn.q_proj", False),
    ("k_proj", "self_attn.k_proj", False),
    ("v_proj", "self_attn.v_proj", False),
    ("q_norm", "self_attn.q_norm", False),
    ("k_norm", "self_attn.k_norm", False),
    ("attention", "self_attn.o_proj", True),
    ("o_proj", "self_attn.o_proj", False),
    ("mlp_norm", "post_attention_layernorm", False),
    ("gate_proj", "mlp.gate_proj", False),
    ("up_proj", "mlp.up_proj", False),
    ("activation", "mlp.down_proj", True),
    ("down_proj", "mlp.down_proj", False),
    ("output", "", False),
)


class Row(NamedTuple):
    """One sublayer of this library compared with that of transformers."""

    name: str  # such as `layer 3 attention`
    absolute: float  # largest difference
    relative: float  # the same over the largest magnitude in transformers
    divergence: float | None = None  # mean KL of next tokens in nats; None except for logits


def walk(path: str | Path, tokens: np.ndarray) -> Iterator[Row]:
    """Rows for every sublayer of a float32 model, in the order of execution; `tokens` are [B, T].

    InteropError for a directory of another family, or where torch or transformers are missing.
    """
    config = load_hf_config(path)
    if not isinstance(config, LlamaConfig):
        raise InteropError(f"{path} is a {config.family}; only the Llama family can be compared by sublayers")
    model, params = load_hf(path, dtype="float32")
    yield from compare(model, params, _reference(path, tokens), tokens)


def compare(model: Model, params: Any, reference: dict[str, np.ndarray], tokens: np.ndarray) -> Iterator[Row]:
    """Rows for our model against recorded sublayers of transformers (see `_reference` for their names)."""
    c = model.config
    length = tokens.shape[1]
    frequencies = rope_frequencies(c.rope, head_dim=c.head_dim, max_length=c.max_length, length=length)
    rope = rope_cos_sin(jnp.arange(length)[None], *frequencies)
    half = c.head_dim // 2
    yield _row("embed", params["embed"][tokens], reference["embed"])
    yield _row("rope cos", rope[0], reference["rope cos"][..., :half])
    yield _row("rope sin", rope[1], reference["rope sin"][..., :half])
    run = jax.jit(lambda layer, x: _sublayers(c, layer, x, rope))
    x = jnp.asarray(reference["embed"])
    for i in range(c.num_layers):
        found = run(jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]), x)
        for name, _, _ in _SUBLAYERS:
            if name in found:
                yield _row(f"layer {i} {name}", found[name], reference[f"layer {i} {name}"])
        x = jnp.asarray(reference[f"layer {i} output"])
    yield _row("final_norm", rms_norm(x, params["final_norm"]["weight"], eps=c.norm_eps), reference["final_norm"])
    whole = jax.jit(lambda p, ids: model.apply({"params": p}, ids))(params, jnp.asarray(tokens))
    row = _row("logits (end to end)", whole, reference["logits"])
    yield row._replace(divergence=_divergence(np.asarray(whole), reference["logits"]))


def _sublayers(config: LlamaConfig, params: Any, x: jax.Array, rope: Any) -> dict[str, jax.Array]:
    """Outputs of every module of one layer, and inputs of two of them: attention and activation."""
    found: dict[str, jax.Array] = {}

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        output = call(*args, **kwargs)
        name = context.module.name
        if name is not None and context.method_name == "__call__":
            found[name] = output
            between = {"o_proj": "attention", "down_proj": "activation"}.get(name)
            if between:
                found[between] = args[0]
        return output

    with nn.intercept_methods(record):
        attend = whole_attention(config, None, jnp.arange(x.shape[1])[None])
        layer = LlamaLayer(config, x.dtype)
        output = layer.apply({"params": params}, x, attend, lambda heads: apply_rope(heads, *rope))
    assert isinstance(output, jax.Array)
    return {**found, "output": output}


def _reference(path: str | Path, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Values of transformers by our names, recorded by hooks during one forward pass."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise InteropError(f"the walk needs torch and transformers ({error}): pip install 'jaxllm[parity]'") from None
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    found: dict[str, np.ndarray] = {}

    def keep(name: str, value: Any) -> None:
        found[name] = (value[0] if isinstance(value, tuple) else value).detach().numpy()

    def watch(module: Any, name: str, inputs: bool) -> None:
        module.register_forward_hook(lambda _, args, out: keep(name, args if inputs else out))

    watch(model.model.embed_tokens, "embed", inputs=False)
    watch(model.model.norm, "final_norm", inputs=False)
    for part, name in enumerate(("rope cos", "rope sin")):
        model.model.rotary_emb.register_forward_hook(lambda _, args, out, p=part, n=name: keep(n, out[p]))
    for i, layer in enumerate(model.model.layers):
        modules = dict(layer.named_modules())
        for name, place, inputs in _SUBLAYERS:
            if place in modules:
                watch(modules[place], f"layer {i} {name}", inputs)
    with torch.no_grad():
        keep("logits", model(torch.tensor(tokens).long()).logits)
    return found


def _row(name: str, ours: Any, want: np.ndarray) -> Row:
    a, b = np.asarray(ours, np.float64), np.asarray(want, np.float64)
    if a.size != b.size:
        raise InteropError(f"{name}: shapes {list(a.shape)} and {list(b.shape)} differ")
    absolute = float(np.abs(a.reshape(b.shape) - b).max())
    return Row(name, absolute, absolute / max(float(np.abs(b).max()), 1e-30))


def _divergence(ours: np.ndarray, want: np.ndarray) -> float:
    # In float64: the rounding of float32 log-probabilities alone would read as a divergence of 1e-8.
    wide = (np.asarray(x, np.float64) for x in (want, ours))
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in wide)
    return float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1)))


def main(arguments: list[str] | None = None) -> int:
    """Prints the comparison; 0 if nothing diverges, 1 with the name of the first sublayer that does."""
    parser = argparse.ArgumentParser(description="Compare transformers and jaxllm sublayer by sublayer.")
    parser.add_argument("directory", type=Path, help="Hugging Face directory of the Llama family")
    parser.add_argument("--length", type=int, default=64, help="random tokens in each of two rows")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest relative difference")
    options = parser.parse_args(arguments)
    if options.length < 1:
        parser.error(f"--length must be at least 1, got {options.length}")
    try:
        vocab = load_hf_config(options.directory).vocab_size
        tokens = np.random.default_rng(0).integers(0, vocab, (2, options.length), dtype=np.int32)
        rows = list(walk(options.directory, tokens))
    except InteropError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for row in rows:
        kl = "" if row.divergence is None else f"  KL {row.divergence:.3e}"
        print(f"{row.name:28} max abs {row.absolute:.3e}  relative {row.relative:.3e}{kl}")
    first = next((row for row in rows if not row.relative <= options.tolerance), None)
    print("no sublayer diverges" if first is None else f"first divergence: {first.name}")
    return int(first is not None)


if __name__ == "__main__":
    sys.exit(main())
