"""Greedy decoding as `generate_stream` runs it, in chunks with the state donated; compared with memory bandwidth."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.card import achievable
from benchmarks.gpu.decode_check import first_chunk
from benchmarks.gpu.profile import traced
from benchmarks.gpu.program import cudnn_calls
from benchmarks.gpu.variants import split
from benchmarks.report import report, spread
from benchmarks.shapes import shape
from jaxllm.generation import loop
from jaxllm.generation.loop import fall_back
from jaxllm.generation.requests import Request, make_request
from jaxllm.models import abstract_params, build, decoder_of
from jaxllm.models.decoder import Decoder
from jaxllm.training.fit import tree_bytes


class Case(NamedTuple):
    """One batch of prompts that is continued greedily."""

    shape: str  # name of the model's shape
    batch: int  # rows
    prompt: int = 512  # tokens of each prompt
    new: int = 512  # tokens that are decoded
    int8: bool = False  # whether the weights are


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
    """Random weights of these shapes, leaf by leaf: the float32 master weights of 8B would not leave much room."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(weights)

    def draw(key: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.dtype == jnp.int8:
            return jax.random.randint(key, leaf.shape, -127, 128, jnp.int8)
        # Products keep the size of what they are given, so that attention has its say.
        std = min(leaf.shape) ** -0.5 if len(leaf.shape) > 1 else 0.02
        return (std * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)

    filled = []
    for i, (path, leaf) in enumerate(leaves):
        norm = jax.tree_util.keystr(path).endswith("norm")
        drawn = None if norm else jax.jit(draw, static_argnums=1)(jax.random.key(i), leaf)
        filled.append(jnp.ones(leaf.shape, leaf.dtype) if drawn is None else drawn)
    return jax.tree.unflatten(structure, filled)


def main(name: str, *, toy: bool, profile: bool = False) -> None:
    """Measures and reports one case; `profile` also prints its largest kernels."""
    case = case_of(name)
    if toy:
        case = case._replace(batch=min(case.batch, 2), prompt=16, new=8)
    model = build(shape(case.shape, toy=toy), dtype=jnp.float32 if toy else jnp.bfloat16)
    params = fill(abstract_weights(model, int8=case.int8))
    prompts = np.random.default_rng(0).integers(1, model.config.vocab_size, (case.batch, case.prompt)).tolist()
    request = make_request(model, params, prompts, max_new_tokens=case.new)
    start = time.perf_counter()
    request, context, state = begin(request)
    first = time.perf_counter() - start
    agreed = agreement(request) if toy or _checked(case) else {}
    before = time.perf_counter()
    begin(request)
    prefill = time.perf_counter() - before
    state, step = decode(name, request, context, state, warm=not toy)
    moved = step_bytes(request, context, state, filled=mean_filled(model.config, case.prompt, case.new))
    values = {
        "seconds": step,
        "tokens_per_second": case.batch / step["median"],
        "prefill_seconds": prefill,
        "compile_and_prefill_seconds": first,
        "read_gb_per_step": moved / 1e9,
        "attention": request.decoder.model.config.attention,
        "cudnn_calls": cudnn_calls(loop.begin.lower(*request[:-1]).compile().as_text() or ""),  # for the prompts
        **agreed,
        **_roof(moved, step["median"]),
    }
    report("decode", name, **values)
    if not agreed.get("tokens_agree", True):
        raise SystemExit(f"{name}: decoded tokens are not those of a forward pass: {agreed}")
    if profile:  # after the result, which it might cost; the last one printed counts
        report("decode", name, **values, **traced_chunk(name, request, seconds=step["median"]))


def begin(request: Request) -> tuple[Request, Any, loop.GenerateState]:
    """Reads the prompts; the request comes back with the attention that ran, as in `generate`."""
    _, *arguments, _ = request
    tried = []

    def run(decoder: Decoder) -> tuple[Any, loop.GenerateState]:
        tried.append(decoder)
        return jax.block_until_ready(loop.begin(decoder, *arguments))

    context, state = fall_back(run, request.decoder)
    return request._replace(decoder=tried[-1]), context, state


def _checked(case: Case) -> bool:
    """Whether a check takes no more than a second or two."""
    return case.shape in ("1b", "8b") and case.batch <= 8 and case.prompt <= 512


def agreement(request: Request) -> dict[str, Any]:
    """How well decoded tokens agree with a forward pass."""
    found = first_chunk(request)
    return {"tokens_agree": found.good, "token_gap": found.gap, "logits_error": found.error}


def decode(
    name: str, request: Request, context: Any, state: Any, *, warm: bool
) -> tuple[loop.GenerateState, dict[str, float]]:
    """The last state, and seconds per step by chunks; with `warm` the first chunk of each segment only compiles."""
    settings, done, times = request.settings, 0, []
    inputs, stopped = (request.decoder, settings, request.params), jnp.zeros(request.keys.shape[:1], bool)
    for attended, until in loop.read_lengths(settings.plan, settings.chunk):
        untimed = warm
        while done < until:
            before = time.perf_counter()
            state, chosen = loop.next_chunk(*inputs, context, state, stopped, attended)
            tokens = np.asarray(chosen)
            if not untimed:
                times.append((time.perf_counter() - before) / settings.chunk)
            if not ((0 <= tokens) & (tokens < request.decoder.model.config.vocab_size)).all():
                raise SystemExit(f"{name}: tokens outside the vocabulary")
            done, untimed = done + settings.chunk, False
    return state, spread(times)


def traced_chunk(name: str, request: Request, *, seconds: float) -> dict[str, Any]:
    """The kernels of the first chunk after the prompt; `seconds` are those of a timed step."""
    _, context, state = begin(request)
    settings = request.settings
    attended, _ = loop.read_lengths(settings.plan, settings.chunk)[0]
    arguments = (request.decoder, settings, request.params, context, state, jnp.zeros(state.finished.shape, bool))

    def program() -> str:
        return loop.next_chunk.lower(*arguments, attended).compile().as_text() or ""

    def run(_: int) -> None:
        jax.block_until_ready(loop.next_chunk(*arguments, attended))

    return traced("decode", name, run, steps=settings.chunk, seconds=seconds, program=program)


def mean_filled(config: Any, prompt: int, new: int) -> float:
    """Slots of the cache that hold a token at the middle of a generation; an encoder's tokens are in no slot."""
    return new / 2 + (0 if config.encoder_decoder else prompt)


def step_bytes(request: Request, context: Any, state: loop.GenerateState, *, filled: float) -> float:
    """Bytes that one step reads: weights, what it reads of an encoder, and `filled` slots of the cache.

    Weights are the layers and the head, and nothing that only prefill needs.
    """
    params, slots = request.params, request.settings.plan.slots
    if request.decoder.model.config.encoder_decoder:
        unread = [layer.cross.key_value for layer in params.decoder.layers]
        weights = tree_bytes((params.decoder, params.head)) - tree_bytes(unread)
    else:
        weights = tree_bytes((params.layers, params.head))
    return weights + tree_bytes(context) + tree_bytes((state.cache.keys, state.cache.values)) * filled / slots


def _roof(moved: float, seconds: float) -> dict[str, float]:
    reachable = achievable(jax.devices()[0].device_kind)
    return {} if reachable is None else {"part_of_measured_bandwidth": moved / seconds / reachable[1]}
