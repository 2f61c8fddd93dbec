"""Invariants of a step: accumulation is exact, precision keeps master weights, every rule trains."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.config import LlamaConfig, OptimizerConfig, PrecisionConfig, TrainingConfig
from jaxllm.models import build, init_params
from jaxllm.training import optimizer as rules
from jaxllm.training.loss import build_loss
from jaxllm.training.optimizer import build_optimizer, build_schedule, decay_mask, phases
from jaxllm.training.train_step import TrainState, init_train_state, make_eval_step, make_train_step
from tests.conftest import TOLERANCE


def batch(rows: int = 4, length: int = 10) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 97, (rows, length + 1)).astype(np.int32)
    weights = (rng.random((rows, length)) < 0.7).astype(np.float32)
    weights[0] = 0  # microbatches of very different weight
    return {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "segment_ids": np.ones((rows, length), np.int32),
        "weights": weights,
    }


@functools.cache
def setup(config: LlamaConfig, *, accumulation: int = 1, dtype: str = "float32", **optimizer: object) -> Any:
    """A compiled step, a first state and the loss; many tests need the same ones."""
    model = build(config, dtype=dtype)
    rule = build_optimizer(OptimizerConfig(**optimizer), PrecisionConfig(), steps=100)
    loss = build_loss(model, TrainingConfig(loss_chunk=8, z_loss=1e-3))
    state = init_train_state(init_params(model, jax.random.key(0)), rule, jax.random.key(1))
    return jax.jit(make_train_step(loss, rule, accumulation=accumulation, dtype=dtype)), state, loss


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulated_equals_full_batch(tiny: LlamaConfig, accumulation: int) -> None:
    whole_step, state, _ = setup(tiny)
    split_step, _, _ = setup(tiny, accumulation=accumulation)
    whole, whole_metrics = whole_step(state, batch())
    split, split_metrics = split_step(state, batch())
    for a, b in zip(jax.tree.leaves(split_metrics), jax.tree.leaves(whole_metrics), strict=True):
        np.testing.assert_allclose(a, b, rtol=TOLERANCE["float32"])
    for a, b in zip(jax.tree.leaves(split.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE["float32_grad"])


def test_weights_of_zero_teach_nothing(tiny: LlamaConfig) -> None:
    step, state, _ = setup(tiny)
    data = batch()
    changed = {**data, "targets": np.where(data["weights"] > 0, data["targets"], 5)}
    for a, b in zip(jax.tree.leaves(step(state, data)), jax.tree.leaves(step(state, changed)), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("factor", [2.0**-12, 3.0])
def test_only_the_ratio_of_weights_counts(tiny: LlamaConfig, factor: float) -> None:
    """Also where they sum to less than 1."""
    step, state, _ = setup(tiny)
    data = batch()
    _, want = step(state, data)
    _, found = step(state, {**data, "weights": data["weights"] * np.float32(factor)})
    np.testing.assert_allclose(found.weight, want.weight * factor, rtol=1e-6)
    np.testing.assert_allclose([*found[:3], found.grad_norm], [*want[:3], want.grad_norm], rtol=1e-5)
    nothing, found = step(state, {**data, "weights": np.zeros_like(data["weights"])})
    assert found.loss == found.grad_norm == 0 and all(
        np.isfinite(leaf).all() for leaf in jax.tree.leaves(nothing.params)
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_masters_moments_and_metrics_stay_float32(tiny: LlamaConfig, dtype: str) -> None:
    step, state, _ = setup(tiny, dtype=dtype)
    state, metrics = step(state, batch())
    leaves = jax.tree.leaves((state.params, state.opt_state, metrics))
    assert all(x.dtype == jnp.float32 for x in leaves if jnp.issubdtype(x.dtype, jnp.floating))
    exact = setup(tiny)
    _, want = exact[0](exact[1], batch())
    np.testing.assert_allclose(metrics.loss, want.loss, rtol=TOLERANCE[dtype])
    np.testing.assert_allclose(metrics.grad_norm, want.grad_norm, rtol=TOLERANCE["bfloat16"])


def test_it_learns_and_counts_steps(tiny: LlamaConfig) -> None:
    step, state, loss = setup(tiny, learning_rate=3e-3)
    data, losses = batch(), []
    for _ in range(30):
        state, metrics = step(state, data)
        losses.append(float(metrics.loss))
    assert int(state.step) == 30
    assert losses[-1] < 0.6 * losses[0]
    sums = jax.jit(make_eval_step(loss, dtype=jnp.float32))(state.params, data)
    assert float(sums.loss / sums.weight) < losses[-1] * 1.02


def test_a_step_compiles_once(tiny: LlamaConfig) -> None:
    step, state, _ = setup(tiny)
    for _ in range(3):
        state, _ = step(state, batch())
    assert step._cache_size() == 1
    assert isinstance(state, TrainState)


def test_decay_spares_norms_and_biases(tiny: LlamaConfig) -> None:
    params = init_params(build(dataclasses.replace(tiny, qkv_bias=True, qk_norm=True)), jax.random.key(0))
    for path, decays in jax.tree_util.tree_leaves_with_path(decay_mask(params)):
        name = path[-1].key
        assert decays == (name in ("kernel", "embed", "lm_head")), jax.tree_util.keystr(path)


def test_adamw_equals_optax_adamw(tiny: LlamaConfig) -> None:
    config = OptimizerConfig(schedule="constant", clip_norm=None, learning_rate=1e-2)
    ours = build_optimizer(config, PrecisionConfig(), steps=10)
    want = optax.adamw(1e-2, 0.9, 0.95, 1e-8, weight_decay=0.1, mask=decay_mask)
    params = init_params(build(tiny), jax.random.key(0))
    grads = jax.tree.map(jnp.cos, params)
    a, b = (rule.update(grads, rule.init(params), params)[0] for rule in (ours, want))
    for ours_leaf, wanted in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(ours_leaf, wanted)


@pytest.mark.parametrize("name", ["adamw", "adamw_rms", "adafactor", "muon"])
def test_decay_is_multiplied_by_the_rate_in_every_rule(name: str) -> None:
    config = OptimizerConfig(name=name, learning_rate=1e-3, weight_decay=0.1, schedule="constant")
    rule = build_optimizer(config, PrecisionConfig(), steps=10)
    params = {"kernel": jnp.full((4, 4), 2.0), "weight": jnp.full((4,), 2.0)}
    updates, _ = rule.update(jax.tree.map(jnp.zeros_like, params), rule.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -2e-4, rtol=1e-5)
    np.testing.assert_array_equal(updates["weight"], 0.0)


def test_adafactor_equals_optax_adafactor() -> None:
    config = OptimizerConfig(
        name="adafactor", learning_rate=1e-2, weight_decay=0.0, schedule="constant", clip_norm=None
    )
    ours, want = build_optimizer(config, PrecisionConfig(), steps=10), optax.adafactor(1e-2)
    key = jax.random.key(0)
    params = {"kernel": jax.random.normal(key, (130, 140)), "weight": jnp.ones(7)}
    states = [rule.init(params) for rule in (ours, want)]
    for i in range(3):
        grads = jax.tree.map(lambda x, i=i: jnp.sin(x * (i + 1)), params)
        results = [rule.update(grads, state, params) for rule, state in zip((ours, want), states, strict=True)]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *(update for update, _ in results))
        states = [state for _, state in results]


def test_adamw_rms_is_adam_times_the_parameters_rms() -> None:
    """The recipe written out: lr * max(rms(p), 1e-3) * Adam's step, bias-corrected."""
    config = OptimizerConfig(
        name="adamw_rms", learning_rate=2e-2, weight_decay=0.0, schedule="constant", clip_norm=None, b2=0.999, eps=1e-6
    )
    rule = build_optimizer(config, PrecisionConfig(), steps=10)
    p, m, v = np.linspace(-3, 2, 12).reshape(3, 4), np.zeros((3, 4)), np.zeros((3, 4))
    params = {"kernel": jnp.asarray(p, jnp.float32)}
    state = rule.init(params)
    for step in range(1, 4):
        g = np.cos(p * step)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        adam = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-6)
        updates, state = rule.update({"kernel": jnp.asarray(g, jnp.float32)}, state, params)
        np.testing.assert_allclose(updates["kernel"], -2e-2 * np.sqrt((p**2).mean()) * adam, rtol=1e-4)


def orthogonal(x: np.ndarray) -> np.ndarray:
    """Five Newton-Schulz steps of Muon in float64."""
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x


def test_muon_equals_its_definition_and_spares_embedding_and_norms() -> None:
    config = OptimizerConfig(name="muon", learning_rate=1e-2, weight_decay=0.0, clip_norm=None, schedule="constant")
    muon = build_optimizer(config, PrecisionConfig(), steps=10)
    adam = build_optimizer(dataclasses.replace(config, name="adamw"), PrecisionConfig(), steps=10)
    rng = np.random.default_rng(0)
    shapes = {"layers": {"kernel": (3, 8, 24), "weight": (3, 8)}, "embed": (16, 8)}
    params = jax.tree.map(lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), shapes, is_leaf=_is_shape)
    states, momentum = [rule.init(params) for rule in (muon, adam)], np.zeros((3, 8, 24))
    for _ in range(3):
        grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
        (ours, first), (theirs, second) = (
            rule.update(grads, state, params) for rule, state in zip((muon, adam), states, strict=True)
        )
        states, gradient = [first, second], grads["layers"]["kernel"].astype(np.float64)
        momentum = 0.95 * momentum + gradient
        want = np.stack([orthogonal(0.95 * m + g) for m, g in zip(momentum, gradient, strict=True)])
        np.testing.assert_allclose(ours["layers"]["kernel"], -1e-2 * 0.2 * np.sqrt(24) * want, rtol=2e-3, atol=1e-6)
        np.testing.assert_array_equal(ours["embed"], theirs["embed"])
        np.testing.assert_array_equal(ours["layers"]["weight"], theirs["layers"]["weight"])


def _is_shape(x: object) -> bool:
    return isinstance(x, tuple)


@pytest.mark.parity
def test_muon_equals_torch() -> None:
    """Within bfloat16, in which torch iterates."""
    torch = pytest.importorskip("torch")
    start = np.random.default_rng(0).normal(size=(8, 24)).astype(np.float32)
    weight = torch.nn.Parameter(torch.tensor(start.T))  # its matrices map the last axis
    theirs = torch.optim.Muon([weight], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    config = OptimizerConfig(name="muon", learning_rate=1e-2, weight_decay=0.1, clip_norm=None, schedule="constant")
    rule, params = (
        build_optimizer(config, PrecisionConfig(), steps=10),
        {"layers": {"kernel": jnp.asarray(start)[None]}},
    )
    state = rule.init(params)
    for i in range(4):
        grad = np.cos(start * (i + 1))
        weight.grad = torch.tensor(grad.T)
        theirs.step()
        updates, state = rule.update({"layers": {"kernel": jnp.asarray(grad)[None]}}, state, params)
        params = optax.apply_updates(params, updates)
    moved, wanted = (np.asarray(x) - start for x in (params["layers"]["kernel"][0], weight.detach().numpy().T))
    assert np.linalg.norm(moved - wanted) < 2e-2 * np.linalg.norm(wanted)


def test_rate_factors_scale_the_updates_of_what_they_name(tiny: LlamaConfig) -> None:
    params = init_params(build(tiny), jax.random.key(0))
    grads = jax.tree.map(jnp.cos, params)
    config = OptimizerConfig(schedule="constant", rate_factors={"layers/up_proj": 0.5, "kernel": 2.0, "embed": 0.0})
    plain, scaled = (
        build_optimizer(each, PrecisionConfig(), steps=10)
        for each in (dataclasses.replace(config, rate_factors={}), config)
    )
    before, after = (rule.update(grads, rule.init(params), params)[0] for rule in (plain, scaled))
    ratios = jax.tree.map(lambda a, b: float(jnp.median(b / a)), before, after)
    assert ratios["layers"]["up_proj"]["kernel"] == 1.0 and ratios["layers"]["q_proj"]["kernel"] == 2.0
    assert ratios["embed"] == 0.0 and ratios["final_norm"]["weight"] == 1.0
    wrong = build_optimizer(OptimizerConfig(rate_factors={"mlpp": 1.0}), PrecisionConfig(), steps=10)
    with pytest.raises(ValueError, match="'mlpp', which is in no path of"):
        wrong.init(params)


SCHEDULES = {
    "cosine": ({}, {0: 0.25, 3: 1.0, 4: 1.0, 52: 0.55, 100: 0.1}),
    "wsd": ({"decay_steps": 20}, {0: 0.25, 3: 1.0, 50: 1.0, 80: 1.0, 90: 0.55, 100: 0.1}),
    "inverse_sqrt": ({}, {0: 0.25, 3: 1.0, 4: 1.0, 16: 0.5, 64: 0.25}),
    "constant": ({}, {0: 0.25, 3: 1.0, 99: 1.0}),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name: str) -> None:
    changes, points = SCHEDULES[name]
    config = OptimizerConfig(learning_rate=1.0, schedule=name, warmup_steps=4, **changes)
    schedule = build_schedule(config, steps=100)
    for step, want in points.items():
        np.testing.assert_allclose(schedule(step), want, rtol=1e-5, err_msg=f"step {step}")


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_short_run_counts_decay_steps_where_the_schedule_reads_them(name: str) -> None:
    config = OptimizerConfig(schedule=name, warmup_steps=40, decay_steps=140)
    assert phases(config, steps=180) == (40, 140)
    assert phases(config, steps=90) == ((20, 70) if name == "wsd" else (40, 140))
    assert phases(config, steps=18) == ((4, 14) if name == "wsd" else (18, 140))


def test_every_name_in_the_config_has_its_own_entry_and_no_other_has_one() -> None:
    hints = get_type_hints(OptimizerConfig)
    assert set(get_args(hints["name"])) == rules.OPTIMIZERS.keys()
    assert set(get_args(hints["schedule"])) == rules.SCHEDULES.keys()


@pytest.mark.parametrize(("setting", "name"), [("name", "lion"), ("schedule", "linear")])
def test_a_name_that_only_the_config_knows_is_refused_by_name(setting: str, name: str) -> None:
    """An unfinished addition: an unknown optimizer once became AdamW with RMS scaling, and a schedule constant."""
    config = OptimizerConfig()
    object.__setattr__(config, setting, name)
    with pytest.raises(ValueError, match=f"optimizer.{setting} '{name}' is not implemented; known: "):
        build_optimizer(config, PrecisionConfig(), steps=10)


def test_rms_scaling_is_per_layer_of_a_stack(tiny: LlamaConfig) -> None:
    params = init_params(build(tiny), jax.random.key(0))
    params["layers"]["q_proj"]["kernel"] = params["layers"]["q_proj"]["kernel"].at[1].multiply(10.0)
    config = OptimizerConfig(name="adamw_rms", weight_decay=0.0, clip_norm=None, schedule="constant")
    rule = build_optimizer(config, PrecisionConfig(), steps=10)
    updates, _ = rule.update(jax.tree.map(jnp.ones_like, params), rule.init(params), params)
    sizes = np.abs(np.asarray(updates["layers"]["q_proj"]["kernel"])).mean(axis=(1, 2))
    np.testing.assert_allclose(sizes[1] / sizes[0], 10, rtol=0.1)


@pytest.mark.parametrize("name", ["adamw", "adamw_rms", "adafactor"])
def test_a_layer_of_a_stack_is_updated_as_if_it_were_alone(name: str) -> None:
    """Also where one layer's gradient is far larger, which Adafactor clips."""
    config = OptimizerConfig(name=name, learning_rate=1e-2, clip_norm=None, schedule="constant")
    rule = build_optimizer(config, PrecisionConfig(), steps=10)
    stack = jax.random.normal(jax.random.key(0), (3, 130, 140)) * jnp.array([1, 5, 0.1])[:, None, None]

    def after(params: dict, grads: list[dict]) -> dict:
        state = rule.init(params)
        for grad in grads:
            updates, state = rule.update(grad, state, params)
            params = optax.apply_updates(params, updates)
        return params

    size = jnp.array([[1, 1, 1], [1, 2, 1], [1, 100, 1]], jnp.float32)[:, :, None, None]
    grads = size * jax.random.normal(jax.random.key(1), (3, *stack.shape))
    together = after({"layers": {"kernel": stack}}, [{"layers": {"kernel": grad}} for grad in grads])
    for i, layer in enumerate(together["layers"]["kernel"]):
        alone = after({"kernel": stack[i]}, [{"kernel": grad[i]} for grad in grads])
        np.testing.assert_allclose(layer - stack[i], alone["kernel"] - stack[i], atol=1e-6, err_msg=f"layer {i}")


def test_muons_momentum_in_bfloat16_decays_as_in_float32() -> None:
    """Decayed in bfloat16, a momentum of 0.99 sums the gradients of a third fewer steps."""
    options = {"momentum": 0.99, "clip_norm": None, "schedule": "constant"}
    params, rng = {"layers": {"kernel": jnp.zeros((1, 32, 32))}}, np.random.default_rng(0)
    rules = [
        build_optimizer(OptimizerConfig(name="muon", moment_dtype=dtype, **options), PrecisionConfig(), steps=10)
        for dtype in ("float32", "bfloat16")
    ]
    states, steps = [rule.init(params) for rule in rules], [jax.jit(rule.update) for rule in rules]
    for _ in range(300):
        grads = {"layers": {"kernel": jnp.asarray(1 + 3 * rng.standard_normal((1, 32, 32)), jnp.float32)}}
        states = [step(grads, state, params)[1] for step, state in zip(steps, states, strict=True)]
    exact, low = (optax.tree.get(state, "trace")["layers"]["kernel"] for state in states)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.vdot(exact, low.astype(jnp.float32)) / np.vdot(exact, exact), 1, atol=0.01)


@pytest.mark.parametrize("b1", [0.9, 0.95, 0.99, 0.999])
def test_a_first_moment_in_bfloat16_decays_by_the_exact_b1(b1: float) -> None:
    """A bfloat16 moment is rounded between steps but decays as in float32, so updates keep their size."""
    options = {"b1": b1, "weight_decay": 0.0, "clip_norm": None, "schedule": "constant"}
    exact, low = (
        build_optimizer(OptimizerConfig(moment_dtype=dtype, **options), PrecisionConfig(), steps=10)
        for dtype in ("float32", "bfloat16")
    )
    params = {"kernel": jnp.zeros((32, 64))}
    states, rng = [rule.init(params) for rule in (exact, low)], np.random.default_rng(0)
    mean = rng.standard_normal((32, 64))
    updates = []
    steps = [jax.jit(rule.update) for rule in (exact, low)]
    for _ in range(150):
        grads = {"kernel": jnp.asarray(mean + rng.standard_normal(mean.shape), jnp.float32)}
        results = [step(grads, state, params) for step, state in zip(steps, states, strict=True)]
        updates, states = [np.asarray(update["kernel"]) for update, _ in results], [state for _, state in results]
    assert {x.dtype for x in jax.tree.leaves(optax.tree.get(states[1], "mu"))} == {jnp.dtype("bfloat16")}
    np.testing.assert_allclose(np.vdot(*updates) / np.vdot(updates[0], updates[0]), 1, atol=2e-3)


@pytest.mark.parametrize(("name", "rate"), [("adamw", 1e-2), ("adamw_rms", 0.3), ("adafactor", 0.3), ("muon", 1e-2)])
def test_every_rule_trains(tiny: LlamaConfig, name: str, rate: float) -> None:
    """Rules that scale by a tensor's RMS (0.02 at the start) need a larger rate for the same step."""
    step, state, _ = setup(tiny, name=name, learning_rate=rate)
    losses = []
    for _ in range(15):
        state, metrics = step(state, batch())
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.9 * losses[0]
