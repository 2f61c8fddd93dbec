"""Every Llama-shaped variant against transformers itself: directories both ways, gradients, padding, low precision."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.config import OptimizerConfig, PrecisionConfig, TrainingConfig
from jaxllm.interop.hf import load_hf_config
from jaxllm.study import capture
from jaxllm.training.loss import build_loss
from jaxllm.training.optimizer import build_optimizer
from jaxllm.training.train_step import init_train_state, make_train_step
from tests.parity import llama_cases as cases

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("tests.parity.torch_llama")

# torch and transformers warn about themselves.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
PACKED = "gqa_tied_linear"


@pytest.mark.parametrize("name", cases.CASES)
def test_logits_loss_and_every_gradient(name: str, llama_numbers, tmp_path: Path, llama_directory) -> None:
    """On the directory that save_pretrained writes, which must give the same as ours."""
    model = theirs.build(name)
    model.save_pretrained(tmp_path)
    (ours, params), (same, again) = jaxllm.load_hf(tmp_path), jaxllm.load_hf(llama_directory(name))
    assert ours == same
    jax.tree.map(np.testing.assert_array_equal, params, again)
    numbers, want = llama_numbers(name), theirs.numbers(model)
    assert cases.logit_error(numbers.logits, want.logits) < cases.LOGITS
    assert numbers.loss == pytest.approx(want.loss, rel=1e-5)
    assert numbers.grads.keys() == want.grads.keys()
    for key, grad in want.grads.items():
        assert np.abs(numbers.grads[key] - grad).max() < cases.GRADS * np.abs(grad).max(), key
    assert theirs.greedy(model) == cases.load_golden(name)["greedy"].tolist()


@pytest.mark.parametrize("name", cases.CASES)
def test_exports_open_in_transformers(name: str, tmp_path: Path, llama_directory) -> None:
    model, params = jaxllm.load_hf(llama_directory(name))
    jaxllm.save_hf(tmp_path, model, params, shard_bytes=30_000)
    assert load_hf_config(tmp_path) == model.config
    opened = theirs.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    built = theirs.build(name)
    for key, value in built.state_dict().items():
        assert torch.equal(opened.state_dict()[key], value), key
    np.testing.assert_array_equal(theirs.logits(opened, cases.tokens()), theirs.logits(built, cases.tokens()))


@pytest.mark.parametrize("original", [16, None])
def test_an_export_of_yarn_has_the_factor_that_transformers_demands(original: int | None, tmp_path: Path) -> None:
    sizes = {"vocab_size": 23, "d_model": 12, "d_ff": 7, "num_layers": 2, "num_heads": 2, "max_length": 64}
    config = jaxllm.LlamaConfig(**sizes, rope=jaxllm.RopeConfig(type="yarn", original_max_length=original))
    model = jaxllm.build(config)
    params = jaxllm.init_params(model, jax.random.key(0))
    jaxllm.save_hf(tmp_path, model, params)
    opened = theirs.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ids = jax.numpy.arange(40)[None] % 23
    want = theirs.logits(opened, np.asarray(ids))
    assert cases.logit_error(model.apply({"params": params}, ids), want) < cases.LOGITS
    again, same = jaxllm.load_hf(tmp_path)
    np.testing.assert_array_equal(again.apply({"params": same}, ids), model.apply({"params": params}, ids))


@pytest.mark.parametrize("name", ("gqa_tied_linear", "biases_yarn_mscale", "longrope_long", "mistral", "qwen3"))
def test_hidden_states_and_attention_maps(name: str, llama_directory) -> None:
    model, params = jaxllm.load_hf(llama_directory(name))
    want = theirs.inside(theirs.build(name), cases.tokens())
    forward = capture(lambda p, ids: model.apply({"params": p}, ids, method="hidden"), "input", "attention_weights")
    last, seen = jax.jit(forward)(params, cases.tokens())
    for key in ("input", "attention_weights"):
        assert seen[f"layers/{key}"].shape == want[key].shape
        assert cases.logit_error(seen[f"layers/{key}"], want[key]) < cases.LOGITS
    assert cases.logit_error(last, want["last"]) < cases.LOGITS


@pytest.fixture(scope="module")
def packed(llama_directory):
    """(our jitted logits of (tokens, positions, segment ids), transformers' model)."""
    model, params = jaxllm.load_hf(llama_directory(PACKED))
    run = jax.jit(lambda ids, at, segments: model.apply({"params": params}, ids, positions=at, segment_ids=segments))
    return lambda *inputs: np.asarray(run(*(jnp.asarray(x, jnp.int32) for x in inputs))), theirs.build(PACKED)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(packed, side: str) -> None:
    ours, model = packed
    ids, lengths = cases.tokens(), np.array([cases.LENGTH, 15])
    index = np.arange(cases.LENGTH)[None]
    real = index >= cases.LENGTH - lengths[:, None] if side == "left" else index < lengths[:, None]
    ids = np.where(real, ids, 0)
    at = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    want = theirs.logits(model, ids, attention_mask=real, position_ids=at)
    found = ours(ids, at, real)
    assert cases.logit_error(found[real], want[real]) < cases.LOGITS
    assert np.isfinite(found).all()
    other = ours(np.where(real, ids, 7), at, real)
    np.testing.assert_array_equal(other[real], found[real])  # nothing leaks from what padding holds


def test_explicit_positions(packed) -> None:
    ours, model = packed
    at = np.cumsum(1 + (cases.noise("gaps", (cases.BATCH, cases.LENGTH)) > 0.4), axis=1) + 30
    want = theirs.logits(model, cases.tokens(), position_ids=at)
    assert cases.logit_error(ours(cases.tokens(), at, np.ones_like(at)), want) < cases.LOGITS


def test_packed_documents_equal_single_ones(packed) -> None:
    ours, model = packed
    ids, cuts = cases.tokens(), [0, 9, 10, 21]
    segments = np.zeros_like(ids)
    at = np.zeros_like(ids)
    for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
        segments[:, start:stop] = number + 1
        at[:, start:stop] = np.arange(stop - start)
    found = ours(ids, at, segments)
    for start, stop in itertools.pairwise(cuts):
        want = theirs.logits(model, ids[:, start:stop])
        assert cases.logit_error(found[:, start:stop], want) < cases.LOGITS
    assert np.isfinite(found).all()


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_rows_that_see_nothing_are_finite(dtype: str, llama_directory) -> None:
    """Left padding in every dtype; transformers' float64 softmax turns such rows, and then real ones, to NaN."""
    with jax.enable_x64(dtype == "float64"):
        model, params = jaxllm.load_hf(llama_directory("mha"), dtype=dtype)
        ids = jnp.asarray(cases.tokens()[:, :8])
        segments = jnp.asarray(np.arange(8)[None] >= np.array([[0], [5]]), jnp.int32)
        found = np.asarray(jax.jit(lambda p: model.apply({"params": p}, ids, segment_ids=segments))(params))
    assert np.isfinite(found).all()
    assert np.abs(found[0] - found[0].mean()).max() > 0.1


LOW = ("mha", "odd_heads_llama3", "biases_yarn_mscale", "qwen3")


def test_bfloat16_is_no_farther_from_the_truth_than_transformers(llama_directory) -> None:
    """RMS error against float64 on the same bfloat16 weights, over four variants."""
    ids = np.concatenate([cases.tokens(f"rows {i}") for i in range(4)])
    ours, others = [], []
    for name in LOW:
        model, params = jaxllm.load_hf(llama_directory(name), dtype="bfloat16")
        found = jax.jit(lambda p, m=model: m.apply({"params": p}, jnp.asarray(ids)))(params)
        low = theirs.logits(theirs.build(name, torch.bfloat16), ids)
        truth = theirs.logits(theirs.build(name, torch.bfloat16).double(), ids)
        ours.append(np.mean((np.asarray(found, np.float64) - truth) ** 2))
        others.append(np.mean((low - truth) ** 2))
    assert all(0 < a <= b for a, b in zip(ours, others, strict=True))


STEPS = 50


def test_fifty_steps_of_adamw_follow_torch(llama_directory) -> None:
    """Same weights and batches through both training loops: losses within 1e-4 of each other at every step."""
    name = "odd_groups_narrow_heads"
    settings = OptimizerConfig(learning_rate=3e-3, schedule="constant", weight_decay=0.1, clip_norm=1.0, b2=0.95)
    batches = [cases.tokens(f"batch {i % 5}") for i in range(STEPS)]
    want = _torch_losses(theirs.build(name), settings, batches)
    model, params = jaxllm.load_hf(llama_directory(name))
    optimizer = build_optimizer(settings, PrecisionConfig(), steps=STEPS)
    step = make_train_step(build_loss(model, TrainingConfig()), optimizer, accumulation=1, dtype=jnp.float32)
    state = init_train_state(params, optimizer, jax.random.key(0))
    step, found = jax.jit(step), []
    for ids in batches:
        batch = {
            "tokens": ids,
            "positions": np.broadcast_to(np.arange(cases.LENGTH, dtype=np.int32), ids.shape),
            "segment_ids": np.ones_like(ids),
            "targets": np.roll(ids, -1, axis=1),
            "weights": np.broadcast_to(np.arange(cases.LENGTH) < cases.LENGTH - 1, ids.shape).astype(np.float32),
        }
        state, metrics = step(state, batch)
        found.append(float(metrics.loss))
    assert want[-1] < want[0] - 1.0  # it learns: the bound below is not about a standstill
    np.testing.assert_allclose(found, want, rtol=1e-4)


def _torch_losses(model: Any, settings: OptimizerConfig, batches: list[np.ndarray]) -> list[float]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(settings.b1, settings.b2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    losses = []
    for ids in batches:
        loss = model(torch.tensor(ids).long(), labels=torch.tensor(ids).long()).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses
