"""Greedy decoding as `generate_stream` runs it: chunks of steps with the state donated, beside the memory roof."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.common import achievable, report, shape, spread
from benchmarks.gpu.variants import split
from jaxllm.config import LlamaConfig
from jaxllm.generation import loop
from jaxllm.generation.family import decoder_of
from jaxllm.generation.requests import make_request
from jaxllm.models import abstract_params, build
from jaxllm.training.fit import tree_bytes


class Case(NamedTuple):
    """One batch of prompts that is continued greedily.

    Attributes:
        shape: name of the model's shape.
        batch: rows.
        prompt: tokens of each prompt.
        new: tokens that are decoded.
        int8: whether the weights are.
    """

    shape: str
    batch: int
    prompt: int = 512
    new: int = 512
    int8: bool = False


CASES = {
    **{f"{name}_b{batch}": Case(name, batch) for name in ("1b", "8b") for batch in (1, 8, 64)},
    **{f"t5_large_b{batch}": Case("t5_large", batch, new=128) for batch in (1, 8, 64)},
    "8b_int8_b1": Case("8b", 1, int8=True),
    "1b_b1_8k": Case("1b", 1, prompt=7936, new=128),
    "8b_b1_8k": Case("8b", 1, prompt=7936, new=128),
}


def case_of(name: str) -> Case:
    """The case of a name, changed by the variants behind its @."""
    base, variants = split(name)
    case = CASES[base]
    for variant in variants:
        case = case._replace(**variant.case)
    return case


def abstract_weights(model: Any, *, int8: bool) -> Any:
    """Shapes of the weights in the decoding layout."""
    return jax.eval_shape(lambda tree: decoder_of(model).prepare(tree, int8=int8), abstract_params(model))


def fill(weights: Any) -> Any:
    """Random weights of these shapes, leaf by leaf: the float32 masters of 8B would not leave much room."""
    leaves, structure = jax.tree.flatten(weights)

    def draw(key: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.dtype == jnp.int8:
            return jax.random.randint(key, leaf.shape, -127, 128, jnp.int8)
        return (0.02 * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)

    filled = [jax.jit(draw, static_argnums=1)(jax.random.key(i), leaf) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, filled)


def main(name: str, *, toy: bool) -> None:
    """Measures and reports one case."""
    shape_name, batch, prompt, new, int8 = case_of(name)
    batch, prompt, new = (min(batch, 2), 16, 8) if toy else (batch, prompt, new)
    model = build(shape(shape_name, toy=toy), dtype=jnp.float32 if toy else jnp.bfloat16)
    params = fill(abstract_weights(model, int8=int8))
    prompts = np.random.default_rng(0).integers(1, model.config.vocab_size, (batch, prompt)).tolist()
    request = make_request(model, params, prompts, max_new_tokens=new)
    settings, start = request.settings, time.perf_counter()
    inputs = (request.decoder, settings, params)
    context, state = jax.block_until_ready(loop.begin(*inputs, request.tokens, request.lengths, request.keys))
    first, times, tokens = time.perf_counter() - start, [], []
    before = time.perf_counter()
    jax.block_until_ready(loop.begin(*inputs, request.tokens, request.lengths, request.keys))
    prefill, stopped = time.perf_counter() - before, jnp.zeros((batch,), bool)
    done = 0
    for attended, until in loop.segments(settings.plan, settings.chunk):
        warm = True  # the first chunk of each segment compiles
        while done < until:
            before = time.perf_counter()
            state, (chosen, _) = loop.next_chunk(*inputs, context, state, stopped, attended)
            tokens.append(np.asarray(chosen))
            done += settings.chunk
            if not warm or toy:
                times.append((time.perf_counter() - before) / settings.chunk)
            warm = False
    if not all(((0 <= part) & (part < model.config.vocab_size)).all() for part in tokens):
        raise SystemExit(f"{name}: tokens outside the vocabulary")
    step = spread(times)
    context_length = (prompt + new / 2) / settings.plan.slots  # mean part of the cache that holds something
    cached = tree_bytes((state.cache.keys, state.cache.values)) * context_length
    moved = read_bytes(model.config, params) + tree_bytes(context) + cached
    report(
        "decode",
        name,
        seconds=step,
        tokens_per_second=batch / step["median"],
        prefill_seconds=prefill,
        compile_and_prefill_seconds=first,
        read_gb_per_step=moved / 1e9,
        **_roof(moved, step["median"]),
    )


def read_bytes(config: Any, params: Any) -> int:
    """Bytes of the weights that one step reads: the layers and the head, and nothing that only prefill needs."""
    if isinstance(config, LlamaConfig):
        return tree_bytes((params.layers, params.head))
    unread = tree_bytes([layer.cross.key_value for layer in params.decoder.layers])
    return tree_bytes((params.decoder, params.head)) - unread


def _roof(moved: float, seconds: float) -> dict[str, float]:
    reachable = achievable(jax.devices()[0].device_kind)
    return {} if reachable is None else {"part_of_measured_bandwidth": moved / seconds / reachable[1]}
