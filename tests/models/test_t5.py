"""Invariants of T5: documents and rows that never meet, causality, one result from every path, and a frozen tree."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import T5Config, TrainingConfig
from jaxllm.jaxprs.interpret import programs
from jaxllm.models import T5, abstract_params, build, init_params
from jaxllm.models.layers import apply
from jaxllm.models.t5 import decode as t5_decode
from jaxllm.models.t5.layer import scale_output
from jaxllm.models.t5.model import Documents
from jaxllm.training.loss import build_loss
from tests.conftest import TOLERANCE

GOLDEN = Path(__file__).parent.parent / "golden" / "t5_tree.json"
CONFIG = T5Config(
    vocab_size=97, d_model=16, d_ff=24, num_layers=2, num_decoder_layers=3, num_heads=4, head_dim=8, dropout_rate=0.1
)
V10 = dataclasses.replace(CONFIG, gated=False, activation="relu", tie_embeddings=True, scale_logits=True)
UMT5 = dataclasses.replace(CONFIG, relative_per_layer=True)
SOURCE, TARGET = 12, 8
SEGMENTS = ("encoder_segment_ids", "decoder_segment_ids")


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, CONFIG.vocab_size, shape).astype(np.int32)


class Compiled:
    """One compiled forward with segment ids and one compiled loss, for the tests that only change inputs."""

    def __init__(self, config: T5Config) -> None:
        self.config = config
        self.model = build(config)
        self.params = init_params(self.model, jax.random.key(0))
        self.forward = jax.jit(self._forward)
        self.loss = jax.jit(build_loss(self.model, TrainingConfig()))

    def _forward(self, params: Any, source: Any, target: Any, source_ids: Any, target_ids: Any) -> jax.Array:
        segments = dict(zip(SEGMENTS, (source_ids, target_ids), strict=True))
        return apply(self.model, params, source, target, **segments)

    def __call__(self, source: Any, target: Any, source_ids: Any = None, target_ids: Any = None) -> np.ndarray:
        source_ids = np.ones_like(source) if source_ids is None else source_ids
        target_ids = np.ones_like(target) if target_ids is None else target_ids
        return np.asarray(self.forward(self.params, source, target, source_ids, target_ids))


@pytest.fixture(scope="module")
def t5() -> Compiled:
    return Compiled(CONFIG)


def test_parameter_tree_is_frozen() -> None:
    """Checkpoints, sharding rules and interop depend on it: change the golden file on purpose only."""
    found = {}
    for name, config in (("v1.1", CONFIG), ("v1.0", V10), ("umt5", UMT5)):
        leaves = jax.tree_util.tree_leaves_with_path(abstract_params(build(config)))
        found[name] = {jax.tree_util.keystr(path): [str(x.dtype), *x.shape] for path, x in leaves}
    assert found == json.loads(GOLDEN.read_text())


def test_initial_sizes_are_those_of_the_paper() -> None:
    config = dataclasses.replace(CONFIG, vocab_size=900, d_model=64, d_ff=96, init_factor=0.5)
    params = init_params(build(config), jax.random.key(0))
    inner = config.num_heads * config.head_dim
    layers = params["decoder"]["layers"]
    want = [
        (params["embed"], 1.0),
        (params["lm_head"], 64**-0.5),
        (layers["attention"]["q_proj"]["kernel"], (64 * config.head_dim) ** -0.5),
        (layers["cross_attention"]["k_proj"]["kernel"], 64**-0.5),
        (layers["attention"]["v_proj"]["kernel"], 64**-0.5),
        (layers["attention"]["o_proj"]["kernel"], inner**-0.5),
        (layers["mlp"]["gate_proj"]["kernel"], 64**-0.5),
        (layers["mlp"]["up_proj"]["kernel"], 64**-0.5),
        (layers["mlp"]["down_proj"]["kernel"], 96**-0.5),
        (params["encoder"]["relative_bias"], 64**-0.5),
    ]
    for leaf, std in want:
        error = 4 / math.sqrt(2 * leaf.size)  # four standard errors of a standard deviation
        assert float(jnp.std(leaf)) == pytest.approx(0.5 * std, rel=error)


def test_an_untrained_model_knows_nothing(t5: Compiled) -> None:
    batch = _batch(0)
    sums = t5.loss(t5.params, batch, None)
    assert float(sums.loss / sums.weight) == pytest.approx(math.log(CONFIG.vocab_size), abs=1.0)


@pytest.mark.parametrize(
    ("layers", "remat"),
    [("unroll", "none"), ("scan", "elementwise"), ("scan", "full")],
)
def test_layer_loops_and_remat_change_nothing(layers: str, remat: str) -> None:
    """Dropout included: its keys belong to layers, not to the way they are compiled."""
    base = dataclasses.replace(CONFIG, num_layers=1, num_decoder_layers=2)
    params = init_params(build(base), jax.random.key(0))
    want, ours = (_gradient(c, params) for c in (base, dataclasses.replace(base, layers=layers, remat=remat)))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=TOLERANCE["float32_grad"] * float(jnp.abs(b).max()))


@functools.cache
def _compiled_gradient(config: T5Config) -> Any:
    loss = build_loss(build(config), TrainingConfig())
    return jax.jit(jax.value_and_grad(lambda params, batch, key: loss(params, batch, key).loss))


def _gradient(config: T5Config, params: Any) -> Any:
    return _compiled_gradient(config)(params, _batch(1), jax.random.key(2))


def _batch(seed: int) -> dict[str, np.ndarray]:
    target = draw(seed + 100, 2, TARGET)
    shifted = np.concatenate([np.zeros((2, 1), np.int32), target[:, :-1]], axis=1)
    return {
        "encoder_tokens": draw(seed, 2, SOURCE),
        "encoder_segment_ids": np.ones((2, SOURCE), np.int32),
        "decoder_tokens": shifted,
        "decoder_segment_ids": np.ones((2, TARGET), np.int32),
        "targets": target,
        "weights": np.ones((2, TARGET), np.float32),
    }


def test_packed_equals_alone(t5: Compiled) -> None:
    sources, targets = [draw(3, 5), draw(4, 4)], [draw(5, 4), draw(6, 3)]
    packed = _row(SOURCE, *sources), _row(TARGET, *targets)
    ids = (
        _row(SOURCE, *([i + 1] * len(x) for i, x in enumerate(sources))),
        _row(TARGET, *([i + 1] * len(x) for i, x in enumerate(targets))),
    )
    together = t5(*packed, *ids)
    start = 0
    for source, target in zip(sources, targets, strict=True):
        alone = t5(
            _row(SOURCE, source), _row(TARGET, target), _row(SOURCE, [1] * len(source)), _row(TARGET, [1] * len(target))
        )
        stop = start + len(target)
        np.testing.assert_allclose(together[:, start:stop], alone[:, : len(target)], atol=1e-5)
        start = stop
    assert np.all(np.isfinite(together))


def test_lengths_equal_segment_ids_and_an_empty_row_poisons_nothing(t5: Compiled) -> None:
    batch, lengths = _batch(9), np.array([5, 0], np.int32)
    weights = np.array([[1.0], [0.0]], np.float32) * np.ones((2, TARGET), np.float32)
    weights[0, 3:] = 0  # the end of a target is padding, which causality masks for the tokens before it
    gradient = jax.jit(jax.value_and_grad(lambda params, batch: t5.loss(params, batch, None).loss))
    inside = (np.arange(SOURCE) < lengths[:, None]).astype(np.int32)
    segments = {"encoder_segment_ids": inside, "decoder_segment_ids": (weights > 0).astype(np.int32)}
    rows = {name: batch[name] for name in ("encoder_tokens", "decoder_tokens", "targets")} | {"weights": weights}
    want, want_grads = gradient(t5.params, rows | segments)
    loss, grads = gradient(t5.params, rows | {"encoder_lengths": lengths})
    assert float(loss) == pytest.approx(float(want), rel=1e-6)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE["float32"] * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize("attention", ["reference", "chunked"])
def test_one_source_for_all_targets_is_that_source_in_each(attention: Literal["reference", "chunked"]) -> None:
    model = build(dataclasses.replace(CONFIG, attention=attention))
    targets = jnp.asarray(draw(3, 2, TARGET))
    params, encoded = (
        init_params(model, jax.random.key(0)),
        jax.random.normal(jax.random.key(1), (1, SOURCE, CONFIG.d_model)),
    )
    lengths = jnp.array([4])

    def loss(source: jax.Array, lengths: jax.Array) -> jax.Array:
        hidden = apply(model, params, targets, source, Documents(encoder_lengths=lengths), method="decode")
        return jnp.sum(jnp.sin(hidden))

    gradient = jax.jit(jax.value_and_grad(loss))
    (one, ours), (each, theirs) = (
        gradient(encoded, lengths),
        gradient(jnp.tile(encoded, (2, 1, 1)), jnp.tile(lengths, 2)),
    )
    assert float(one) == pytest.approx(float(each), rel=1e-6)
    np.testing.assert_allclose(ours[0], theirs.sum(axis=0), atol=TOLERANCE["float32_grad"] * float(jnp.abs(ours).max()))


def _row(length: int, *parts: Any) -> np.ndarray:
    joined = np.concatenate([np.asarray(part, np.int32) for part in parts])
    return np.pad(joined, (0, length - len(joined)))[None]


def test_rows_of_a_batch_never_see_each_other(t5: Compiled) -> None:
    """Two batches in one call, or one after the other: what the second holds can't change the first by one bit."""
    first, other = _batch(7), _batch(8)
    swapped = {k: np.concatenate([first[k][:1], other[k][1:]]) for k in first}
    only_first = np.array([[1.0], [0.0]], np.float32) * np.ones((2, TARGET), np.float32)
    losses = [t5.loss(t5.params, {**batch, "weights": only_first}, None).loss for batch in (first, swapped, first)]
    assert float(losses[0]) == float(losses[1]) == float(losses[2])
    flipped = {k: v[::-1] for k, v in first.items()}
    moved = t5.loss(t5.params, {**flipped, "weights": only_first[::-1]}, None).loss
    assert float(moved) == float(losses[0])
    assert float(t5.loss(t5.params, other, None).loss) != float(t5.loss(t5.params, first, None).loss)


@pytest.mark.parametrize("method", ["__call__", "hidden", "encode", "decode"])
def test_a_training_call_accepts_no_cache(method: str) -> None:
    allowed = {"self", "encoder_tokens", "decoder_tokens", "encoded", *Documents._fields, "documents", "key"}
    assert set(inspect.signature(getattr(T5, method)).parameters) <= allowed


def test_padding_of_the_source_changes_nothing(t5: Compiled) -> None:
    target = draw(9, 1, TARGET)
    ids = _row(SOURCE, [1] * 7)
    want = t5(_row(SOURCE, draw(10, 7)), target, ids)
    other_padding = np.where(ids == 1, _row(SOURCE, draw(10, 7)), draw(11, 1, SOURCE))
    np.testing.assert_array_equal(t5(other_padding, target, ids), want)
    short = jax.jit(lambda p, s, t: apply(t5.model, p, s, t))(t5.params, draw(10, 7)[None], target)
    np.testing.assert_allclose(want, short, atol=1e-5)


def test_no_target_sees_the_future(t5: Compiled) -> None:
    source, target = draw(12, 1, SOURCE), draw(13, 1, TARGET)
    want = t5(source, target)
    for place in (1, 4, TARGET - 1):
        changed = target.copy()
        changed[0, place] = changed[0, place] % (CONFIG.vocab_size - 1) + 1
        found = np.abs(t5(source, changed) - want).max(axis=-1)[0]
        assert not found[:place].any() and found[place:].all()


def test_every_target_sees_every_source_token(t5: Compiled) -> None:
    source, target = draw(14, 1, SOURCE), draw(15, 1, TARGET)
    want = t5(source, target)
    for place in (0, SOURCE - 1):
        changed = source.copy()
        changed[0, place] = changed[0, place] % (CONFIG.vocab_size - 1) + 1
        assert np.abs(t5(changed, target) - want).max(axis=-1)[0].all()


def test_dropout_is_in_all_of_t5s_places() -> None:
    config = dataclasses.replace(CONFIG, layers="unroll")
    params = abstract_params(build(config))
    source, target = jnp.zeros((1, SOURCE), jnp.int32), jnp.zeros((1, TARGET), jnp.int32)

    def places(config: T5Config, key: Any) -> int:
        forward = jax.make_jaxpr(lambda p, k: apply(build(config), p, source, target, key=k))
        return _count(forward(params, key).jaxpr, "random_bits")

    stacks = 2 * 2  # after the embedding and after the last norm
    per_layer = 4 * config.num_layers + 6 * config.num_decoder_layers  # weights and output of attention, twice in MLP
    assert places(config, jax.random.key(0)) == stacks + per_layer
    assert places(config, None) == 0
    assert places(dataclasses.replace(config, dropout_rate=0.0), jax.random.key(0)) == 0


def _count(jaxpr: Any, primitive: str) -> int:
    inner = [value for eqn in jaxpr.eqns for value in programs(eqn)]
    return sum(eqn.primitive.name == primitive for eqn in jaxpr.eqns) + sum(_count(part, primitive) for part in inner)


def test_dropout_on_a_path_without_it_is_an_error() -> None:
    model = build(dataclasses.replace(CONFIG, attention="chunked"))
    tokens = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match=r"chunked has no dropout; use attention: auto or dropout_rate: 0"):
        jax.eval_shape(lambda p: apply(model, p, tokens, tokens, key=jax.random.key(0)), abstract_params(model))


@pytest.mark.parametrize("config", [CONFIG, V10, UMT5], ids=["v1.1", "v1.0", "umt5"])
def test_cached_equals_uncached(config: T5Config, t5: Compiled) -> None:
    """Two batches through the same compiled functions, rows of different lengths, up to the last slot."""
    runner = t5 if config is CONFIG else Compiled(config)
    model = runner.model
    params = t5_decode.prepare_for_decode(runner.params, dtype=jnp.float32)
    prefill = jax.jit(lambda p, source, lengths: t5_decode.prefill(model, p, source, lengths, capacity=TARGET))
    step = jax.jit(lambda p, *state: t5_decode.decode_step(model, p, *state))
    for seed in (20, 30):
        source, target = draw(seed, 2, SOURCE), draw(seed + 1, 2, TARGET)
        lengths = np.array([SOURCE, 5], np.int32)
        ids = (np.arange(SOURCE)[None] < lengths[:, None]).astype(np.int32)
        want = runner(source, target, ids)
        cross, cache = prefill(params, source, lengths)
        found = []
        for t in range(TARGET):
            logits, cache = step(params, cross, cache, target[:, t], np.full((2,), t, np.int32))
            found.append(logits)
        np.testing.assert_allclose(np.stack(found, axis=1), want, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_close_and_logits_are_float32(t5: Compiled, dtype: str) -> None:
    source, target = draw(40, 2, SOURCE), draw(41, 2, TARGET)
    model = build(CONFIG, dtype=jnp.dtype(dtype))
    ours = jax.jit(lambda *a: apply(model, *a))(t5.params, source, target)
    want = t5(source, target)
    assert ours.dtype == jnp.float32
    assert np.abs(ours - want).max() < 2 * TOLERANCE[dtype] * np.abs(want).max()


def test_float16_survives_a_stream_beyond_its_range(t5: Compiled) -> None:
    """T5's well-known NaN: one sum after the MLP above 65504."""
    loud = jax.tree.map(lambda leaf: leaf, t5.params)
    loud["encoder"]["layers"]["mlp"]["down_proj"]["kernel"] *= 3e4
    source, target = draw(42, 2, SOURCE), draw(43, 2, TARGET)
    model = build(CONFIG, dtype=jnp.float16)
    ours = np.asarray(jax.jit(lambda *a: apply(model, *a))(loud, source, target))
    want = np.asarray(t5.forward(loud, source, target, np.ones_like(source), np.ones_like(target)))
    assert np.abs(ours - want).max() < 5 * TOLERANCE["float16"] * np.abs(want).max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scaled_output_has_the_exact_factor(dtype: str) -> None:
    config = dataclasses.replace(V10, d_model=768)
    x = jnp.linspace(1, 2, 2**12).astype(dtype)
    factors = np.asarray(scale_output(config, x), np.float64) / np.asarray(x, np.float64)
    np.testing.assert_allclose(factors.mean(), 768**-0.5, rtol=1e-4)


def test_tied_head_is_the_embedding() -> None:
    model = build(V10)
    params = abstract_params(model)
    assert "lm_head" not in params
    head = jax.eval_shape(lambda p: apply(model, p, method="head"), params)
    assert head.shape == params["embed"].shape
