"""The loss scale moves as torch's does, never leaves its bounds, and a skipped step changes nothing at all."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.training.attribution import all_finite, finite_rows
from jaxllm.training.precision import (
    dynamic_loss_scale,
    loss_scale_of,
    loss_scale_state,
    static_loss_scale,
    unscale,
)

TINY, HUGE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
LENGTH = 40
PARAMS = {"w": np.array([[1.5, -0.0], [0.25, -3.0]], np.float32), "b": np.array([0.0, 2.0], np.float32)}


@functools.cache
def trajectory(interval: int, low: float, high: float, hysteresis: int):
    """Jitted: overflow flags and first scale -> scale and tracker after each step, and the last state."""
    rule = dynamic_loss_scale(
        optax.sgd(0.1),
        initial_scale=low,
        growth_interval=interval,
        min_scale=low,
        max_scale=high,
        hysteresis=hysteresis,
    )

    @jax.jit
    def run(overflow, start):
        def step(state, bad):
            _, state = rule.update({"w": jnp.where(bad, jnp.inf, 1.0)}, state, {"w": jnp.zeros(())})
            return state, (state.scale, state.tracker)

        return jax.lax.scan(step, rule.init({"w": jnp.zeros(())})._replace(scale=start), overflow)

    return run


@pytest.mark.parametrize("interval", [1, 4])
@settings(max_examples=40, deadline=None)
@given(
    overflow=st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH),
    exponent=st.sampled_from([16, 0, -60, 120, 127]),
)
@pytest.mark.parity
def test_trajectory_is_torchs(interval: int, overflow: list[bool], exponent: int) -> None:
    torch = pytest.importorskip("torch")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**exponent, growth_interval=interval)
    weight = torch.nn.Parameter(torch.zeros(()))
    rule = torch.optim.SGD([weight], lr=0.0)
    scaler.scale(torch.zeros(()))
    want = []
    for bad in overflow:
        weight.grad = torch.tensor(float("inf") if bad else 1.0)
        scaler.step(rule)
        scaler.update()
        want.append((scaler.get_scale(), scaler._get_growth_tracker()))
    _, got = trajectory(interval, TINY, HUGE, 1)(np.array(overflow), np.float32(2.0**exponent))
    np.testing.assert_array_equal(np.stack(got, axis=1), np.array(want))


# interval, floor, ceiling, hysteresis, steps (x = overflow), scale after each, from 8.
TABLE = [
    (2, 1, 64, 1, "..x..xx", [8, 16, 8, 8, 16, 8, 4]),
    (2, 1, 64, 1, "........", [8, 16, 16, 32, 32, 64, 64, 64]),
    (2, 1, 50, 1, "......", [8, 16, 16, 32, 32, 32]),  # growth past the ceiling is not done
    (3, 2, 64, 1, "xxxx...", [4, 2, 2, 2, 2, 2, 4]),
    (9, 1, 64, 2, "x.x.xxx.x", [8, 8, 8, 8, 8, 4, 2, 2, 2]),  # from the second overflow in a row on
]


@pytest.mark.parametrize(("interval", "low", "high", "hysteresis", "steps", "want"), TABLE)
def test_trajectory_by_table(interval, low, high, hysteresis, steps, want) -> None:
    flags = np.array([s == "x" for s in steps.ljust(LENGTH, ".")])
    last, (scales, _) = trajectory(interval, float(low), float(high), hysteresis)(flags, np.float32(8))
    np.testing.assert_array_equal(scales[: len(want)], want)
    assert int(last.skipped) == steps.count("x")


def test_without_a_floor_torch_dies_and_we_do_not() -> None:
    """164 overflows take torch's scale to 0; ours stops at its floor and counts there."""
    run = trajectory(2000, 1.0, HUGE, 1)
    last, (scales, _) = run(np.ones(LENGTH, bool), np.float32(65536))
    assert float(scales[-1]) == 1.0 and int(last.at_floor) == LENGTH - 16
    last, _ = run(np.arange(LENGTH) < LENGTH - 1, np.float32(65536))
    assert int(last.at_floor) == 0


@pytest.mark.parametrize("scale", [0.0, np.inf])
def test_a_broken_scale_is_an_overflow(scale: float) -> None:
    """Gradients that are finite before division and not after it are caught too."""
    rule = dynamic_loss_scale(optax.sgd(0.1))
    state = rule.init(PARAMS)._replace(scale=jnp.float32(scale))
    updates, state = rule.update(jax.tree.map(lambda p: p * 0 if scale == 0 else p + np.inf, PARAMS), state, PARAMS)
    assert int(state.skipped) == 1
    assert np.isfinite(optax.apply_updates(PARAMS, updates)["w"]).all()


def inner_rule() -> optax.GradientTransformation:
    """Every kind of state that a skipped step must leave alone: norm, moments, averages, a schedule's count."""
    schedule = optax.linear_schedule(1e-2, 0.0, 10)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(),
        optax.add_decayed_weights(0.1),
        optax.ema(0.9),
        optax.scale_by_learning_rate(schedule),
    )


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize(
    "wrap", [dynamic_loss_scale, lambda r: static_loss_scale(r, 1024.0)], ids=["dynamic", "static"]
)
def test_a_skipped_step_changes_no_bit(bad: float, wrap) -> None:
    rule = optax.chain(optax.identity(), wrap(inner_rule()))  # found when chained, too
    step = jax.jit(lambda g, s, p: rule.update(g, s, p))
    grads = jax.tree.map(np.cos, PARAMS)
    updates, state = step(grads, rule.init(PARAMS), PARAMS)
    params = optax.apply_updates(PARAMS, updates)
    grads["w"] = grads["w"].copy()
    grads["w"][1, 0] = bad
    updates, after = step(grads, state, params)
    before, scale = loss_scale_state(state), loss_scale_state(after)
    for old, new in zip(
        jax.tree.leaves((params, before.inner)),
        jax.tree.leaves((optax.apply_updates(params, updates), scale.inner)),
        strict=True,
    ):
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes()
    kept = optax.apply_updates(PARAMS, jax.tree.map(lambda u: jnp.where(True, -0.0, u), updates))
    assert np.asarray(kept["w"]).tobytes() == PARAMS["w"].tobytes()  # the sign of -0.0 too
    assert (int(scale.skipped), int(scale.tracker), int(scale.overflows)) == (1, 0, 1)


def test_around_a_rule_it_changes_nothing_but_the_scale() -> None:
    """Powers of two cancel exactly, so that clipping and Adam get the same gradients as without a scale."""
    plain, scaled = inner_rule(), dynamic_loss_scale(inner_rule(), growth_interval=2)
    states, params = [plain.init(PARAMS), scaled.init(PARAMS)], [PARAMS, PARAMS]
    update = [jax.jit(plain.update), jax.jit(scaled.update)]
    for i in range(5):
        grads = jax.tree.map(lambda p, i=i: np.sin(p + i), PARAMS)
        for side in (0, 1):
            scale = loss_scale_of(states[side])
            carried = jax.tree.map(lambda g, scale=scale: g * scale, grads)
            updates, states[side] = update[side](carried, states[side], params[side])
            params[side] = optax.apply_updates(params[side], updates)
    jax.tree.map(np.testing.assert_array_equal, *params)
    assert float(loss_scale_of(states[0])) == 1 and float(loss_scale_of(states[1])) == 2**18


def test_float16_gradients_are_unscaled_in_float32() -> None:
    """2^-20 / 2^16 is zero in float16."""
    small = unscale({"w": jnp.full(2, 2.0**-20, jnp.float16)}, jnp.float32(2.0**16))["w"]
    assert small.dtype == jnp.float32 and float(small[0]) == 2.0**-36


def test_extra_arguments_reach_the_rule() -> None:
    def update(updates, state, params=None, *, factor):
        return jax.tree.map(lambda u: u * factor, updates), state

    rule = dynamic_loss_scale(optax.GradientTransformationExtraArgs(lambda p: optax.EmptyState(), update))
    updates, _ = rule.update({"w": jnp.float32(2.0**16)}, rule.init({"w": 0.0}), factor=3.0)
    assert float(updates["w"]) == 3.0


@pytest.mark.parametrize(
    "constants",
    [
        {"min_scale": 0.0},
        {"initial_scale": 2.0**30},
        {"backoff_factor": 1.0},
        {"hysteresis": 0},
        {"growth_interval": 0},
    ],
)
def test_impossible_constants_are_refused(constants: dict) -> None:
    with pytest.raises(ValueError, match="need"):
        dynamic_loss_scale(optax.sgd(1.0), **constants)


def test_state_is_found_inside_a_chain() -> None:
    state = optax.chain(optax.identity(), dynamic_loss_scale(optax.adam(0.1), initial_scale=4.0)).init(PARAMS)
    assert loss_scale_state(state) is state[1] and float(loss_scale_of(state)) == 4
    assert loss_scale_state(optax.adam(0.1).init(PARAMS)) is None


def test_finiteness_of_trees_and_of_rows() -> None:
    stack = jnp.array([[1.0, 2.0], [jnp.nan, 0.0], [0.0, 0.0]])
    assert finite_rows(stack).tolist() == [True, False, True]
    assert not all_finite({"a": stack, "b": jnp.zeros(2)}) and all_finite({"a": stack[2], "b": jnp.zeros(())})


def test_a_known_answer_is_taken() -> None:
    rule = dynamic_loss_scale(optax.sgd(0.1))
    _, state = rule.update(PARAMS, rule.init(PARAMS), PARAMS, finite=jnp.asarray(False))
    assert int(state.skipped) == 1


SHARDED = """
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxllm.training.precision import dynamic_loss_scale
mesh = Mesh(np.array(jax.devices()), ("data",))
place = NamedSharding(mesh, P("data"))
params = jax.device_put({"w": np.ones((4, 2), np.float32)}, place)
rule = dynamic_loss_scale(optax.adam(0.1))
state = jax.jit(rule.init)(params)
grads = np.ones((4, 2), np.float32)
grads[3, 1] = np.inf  # only the second device holds it
updates, after = jax.jit(rule.update)(jax.device_put({"w": grads}, place), state, params)
for shard in updates["w"].addressable_shards:
    assert not np.any(np.asarray(shard.data)), shard
assert len(jax.devices()) == 2 and int(after.skipped) == 1 and int(after.inner[0].count) == 0
"""


def test_one_decision_for_all_devices() -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
