"""float16 in whole steps and runs: batches are dropped, overflows are named by layer, and hopeless runs stop."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import LlamaConfig, OptimizerConfig, PrecisionConfig, T5Config, TrainingConfig
from jaxllm.jaxprs.observe import Observer, first_nonfinite, headroom
from jaxllm.models import build, init_params
from jaxllm.models.layers import Islands
from jaxllm.ops.pointwise import ACTIVATIONS
from jaxllm.run.record import read_metrics
from jaxllm.run.start import TrainingStopped
from jaxllm.run.trainer import pretrain
from jaxllm.training.attribution import first_nonfinite as first_group
from jaxllm.training.attribution import gradient_groups
from jaxllm.training.loss import build_loss
from jaxllm.training.optimizer import build_optimizer, build_schedule
from jaxllm.training.precision import cast_floating, loss_scale_state
from jaxllm.training.train_step import init_train_state, make_train_step
from tests.run.test_pretrain import config as run_config
from tests.run.test_pretrain import losses
from tests.training.test_train_step import batch

MODEL = LlamaConfig(vocab_size=97, d_model=16, d_ff=32, num_layers=3, num_heads=2, max_length=16)
TOO_LARGE = 2.0**40


@pytest.fixture(scope="module")
def dropping():
    """A jitted float16 step and its first state."""
    model = build(MODEL, dtype=jnp.float16)
    precision = PrecisionConfig(compute="float16", loss_scale="dynamic", max_scale=TOO_LARGE)
    rule = build_optimizer(OptimizerConfig(), precision, steps=100)
    loss = build_loss(model, TrainingConfig(loss_chunk=8))
    step = make_train_step(loss, rule, accumulation=2, dtype=jnp.float16)
    return jax.jit(step), init_train_state(init_params(model, jax.random.key(0)), rule, jax.random.key(1))


def at_scale(state, scale: float):
    scaling = loss_scale_state(state.opt_state)
    return state._replace(opt_state=scaling._replace(scale=jnp.float32(scale)))


def same_bits(left, right) -> bool:
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def test_an_overflow_drops_the_batch_and_names_the_gradient(dropping) -> None:
    step, state = dropping
    after, metrics = step(at_scale(state, TOO_LARGE), batch())
    assert same_bits(after.params, state.params) and int(after.step) == 1
    assert (float(metrics.skipped), float(metrics.loss_scale)) == (1, TOO_LARGE)
    assert float(loss_scale_state(after.opt_state).scale) == TOO_LARGE / 2
    assert gradient_groups(state.params)[int(metrics.culprit)] == "lm_head"


def test_a_dropped_batch_fits_when_the_scale_has_fallen_far_enough(dropping) -> None:
    step, state = dropping
    before, dropped = at_scale(state, TOO_LARGE), 0
    after, metrics = step(before, batch())
    while metrics.culprit >= 0:
        assert same_bits(after.params, state.params)
        before, dropped = after, dropped + 1
        after, metrics = step(before, batch())
    assert dropped > 10 and float(metrics.skipped) == dropped
    assert float(metrics.loss_scale) == TOO_LARGE / 2**dropped
    assert not same_bits(after.params, state.params)


def test_the_compiled_step_looks_at_each_gradient_once(dropping) -> None:
    """One check gives the decision and the first non-finite group, fused with the unscaling; five scalars of state."""
    step, state = dropping
    text = step.lower(state, batch()).compile().as_text()
    looks = [line for line in text.splitlines() if " is-finite(" in line]
    assert len(looks) == len(jax.tree.leaves(state.params))
    inner = jax.tree.leaves(state.opt_state.inner)
    extra = jax.tree.leaves(state.opt_state)[: -len(inner)]
    assert sum(x.nbytes for x in extra) == 20


def test_first_group_is_the_first_of_the_backward_pass() -> None:
    params = jax.eval_shape(lambda: init_params(build(MODEL), jax.random.key(0)))
    names, find = gradient_groups(params), jax.jit(first_group)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), params)
    assert int(find(zeros)) == -1
    zeros["embed"] = zeros["embed"].at[5, 3].set(jnp.nan)
    assert names[int(find(zeros))] == "embed"
    layers = zeros["layers"]
    layers["q_proj"]["kernel"] = layers["q_proj"]["kernel"].at[:2].set(jnp.inf)
    layers["up_proj"]["kernel"] = layers["up_proj"]["kernel"].at[0].set(jnp.inf)
    assert names[int(find(zeros))] == "layers/1/q_proj/kernel"
    assert len(names) == 3 + 3 * len(jax.tree.leaves(layers))


def test_the_backward_pass_reaches_t5s_mlp_before_cross_attention_and_that_before_attention() -> None:
    params = jax.eval_shape(lambda: init_params(build(T5_MODEL), jax.random.key(0)))
    layer = "decoder/layers/1/"
    modules = [name.split("/")[3] for name in gradient_groups(params) if name.startswith(layer)]
    order = ["mlp", "mlp_norm", "cross_attention", "cross_norm", "attention", "attn_norm"]
    assert list(dict.fromkeys(modules)) == order
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), params)
    for module in ("cross_attention", "mlp"):
        part = zeros["decoder"]["layers"][module]
        leaf = "o_proj" if module == "cross_attention" else "up_proj"
        part[leaf]["kernel"] = part[leaf]["kernel"].at[1].set(jnp.inf)
    assert gradient_groups(params)[int(first_group(zeros))] == f"{layer}mlp/up_proj/kernel"


@pytest.fixture(scope="module")
def observers():
    """Forward and gradient observers of a float16 Llama, over (params, scale)."""
    forward = scaled_loss(MODEL)
    return Observer(forward, jnp.float16), Observer(jax.grad(forward), jnp.float16)


def scaled_loss(config):
    loss = build_loss(build(config, dtype=jnp.float16), TrainingConfig(loss_chunk=64))
    data = jax.tree.map(jnp.asarray, batch())

    def forward(params, scale):
        return scale * loss(cast_floating(params, jnp.float16), data, jax.random.key(0)).loss

    return forward


def planted(layer: int):
    """Parameters whose layer's MLP output exceeds float16: the norm makes every input of size 1."""
    params = init_params(build(MODEL), jax.random.key(0))
    layers = params["layers"]
    layers["mlp_norm"]["weight"] = layers["mlp_norm"]["weight"].at[layer].set(500.0)
    layers["down_proj"]["kernel"] = layers["down_proj"]["kernel"].at[layer].multiply(1e5)
    return params


@pytest.mark.parametrize("layer", [0, 2])
def test_a_planted_overflow_is_named_by_layer_and_module(observers, layer: int) -> None:
    for observe in observers:
        found = first_nonfinite(observe(planted(layer), 1.0))
        assert (found.block, found.backward) == (f"LlamaLayer[{layer}]", False)
        assert found.name.startswith(f"LlamaLayer[{layer}]/down_proj: ")


def test_single_layers_are_numbered_as_those_of_a_loop() -> None:
    observe = Observer(jax.grad(scaled_loss(dataclasses.replace(MODEL, layers="unroll"))), jnp.float16)
    found = first_nonfinite(observe(planted(2), 1.0))
    assert found.name.startswith("LlamaLayer[2]/down_proj: ")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_nan_among_many_numbers_is_seen(dtype: str) -> None:
    """Without an infinite value; a maximum alone would miss it, since XLA:CPU's leaves NaNs out."""
    values = jnp.ones((64, 1024), dtype).at[7, 100].set(-1)
    observe = Observer(lambda x: 2 * jnp.sqrt(x), dtype)
    assert first_nonfinite(observe(abs(values))) is None
    found = first_nonfinite(observe(values))
    assert found.name.endswith(": sqrt") and np.isnan(found.largest)


T5_MODEL = T5Config(vocab_size=97, d_model=16, d_ff=32, num_layers=2, num_heads=2, head_dim=8)


def t5_loss(residual: str | None):
    """A float16 T5's loss as a function of parameters, on ten tokens of both sides."""
    loss = build_loss(
        build(T5_MODEL, dtype=jnp.float16, islands=Islands(residual=residual)), TrainingConfig(loss_chunk=64)
    )
    ids, ones = jnp.asarray(batch()["tokens"]), jnp.ones((4, 10), jnp.int32)
    data = {"encoder_tokens": ids, "decoder_tokens": ids, "targets": ids, "weights": jnp.ones((4, 10))}
    data |= {"encoder_segment_ids": ones, "decoder_segment_ids": ones}

    def forward(params):
        return loss(cast_floating(params, jnp.float16), data, None).loss

    return forward


def large_t5(factor: float):
    """Parameters whose second encoder layer adds activations of about `factor` to the residual stream."""
    params = init_params(build(T5_MODEL), jax.random.key(0))
    mlp = params["encoder"]["layers"]["mlp"]
    mlp["down_proj"]["kernel"] = mlp["down_proj"]["kernel"].at[1].multiply(factor)
    return params


def test_t5s_islands_hold_activations_beyond_float16_and_without_them_it_is_named() -> None:
    """66246 after the MLP is what real T5 checkpoints reach; float16 ends at 65504."""
    params = large_t5(3e4)
    readings = Observer(t5_loss(None), jnp.float32)(params)
    largest = max(reading.largest for reading in readings if reading.block == "EncoderLayer[1]")
    assert largest > 66246
    loss, grads = jax.jit(jax.value_and_grad(t5_loss(None)))(params)
    assert np.isfinite(loss) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    found = first_nonfinite(Observer(t5_loss("float16"), jnp.float16)(params))
    assert (found.block, found.backward) == ("EncoderLayer[1]", False)


def test_headroom_is_the_number_of_doublings_left(observers) -> None:
    params = init_params(build(MODEL), jax.random.key(0))
    readings = observers[0](params, 1.0)
    assert first_nonfinite(readings) is None
    bits = headroom(readings, jnp.float16)
    blocks = [f"LlamaLayer[{i}]" for i in range(3)]
    assert set(bits) == {*blocks, "final_norm"}
    largest = max(r.largest for r in readings if r.block == blocks[1])
    assert largest * 2 ** bits[blocks[1]] == pytest.approx(65504, rel=1e-4)
    overflowed = headroom(observers[0](planted(1), 1.0), jnp.float16)
    assert overflowed[blocks[0]] > 0 and overflowed[blocks[1]] == -np.inf


def test_an_overflow_of_the_backward_pass_is_named_as_one(observers) -> None:
    found = first_nonfinite(observers[1](init_params(build(MODEL), jax.random.key(0)), TOO_LARGE))
    assert found.backward


PRECISION = {"compute": "float16", "loss_scale": "dynamic"}


def small_run(folder: Path, name: str, corpus: Path, precision: dict):
    """One layer, and one compilation for all runs of a test."""
    training = {
        "run_dir": str(folder / name),
        "steps": 6,
        "eval_every": 6,
        "save_every": 3,
        "sample_tokens": 0,
    }
    model = {"num_layers": 1, "d_model": 16, "num_heads": 2}
    return run_config(folder / name, corpus, precision=precision, training=training, model=model)


def test_a_float16_run_resumes_its_scale_exactly(tmp_path: Path, corpus: Path) -> None:
    """The scale starts too high, so that overflows, a growth and their counters are all in the state."""
    precision = {**PRECISION, "initial_scale": 2.0**22, "growth_interval": 2}
    whole, parts = (small_run(tmp_path, name, corpus, precision) for name in ("whole", "parts"))
    pretrain(whole)
    pretrain(parts, stop_at=3)
    pretrain(parts)
    assert same_bits(final_state(whole), final_state(parts))
    assert losses(whole) == losses(parts)
    scaling = final_state(whole)["opt_state"]
    assert scaling["scale"] < 2.0**22 and scaling["skipped"] > 0 and scaling["inner"]
    rows = [row for row in read_metrics(Path(whole.training.run_dir) / "metrics.jsonl") if "loss" in row]
    assert rows[0]["skipped"] == 1 and "headroom/LlamaLayer[0]" in rows[0]
    # The rate of a step depends on the number of updates before it, also when the step is skipped.
    schedule, skipped = build_schedule(whole.optimizer, steps=6), [0, *(int(row["skipped"]) for row in rows)]
    rates = [np.asarray(schedule(step - before)).item() for step, before in zip(range(6), skipped, strict=False)]
    assert [row["learning_rate"] for row in rows] == rates


def final_state(run, step: int = 6):
    import orbax.checkpoint as ocp

    folder = Path(run.training.run_dir) / "checkpoints" / str(step) / "state"
    state = ocp.StandardCheckpointer().restore(folder.absolute())
    return {name: state[name] for name in ("params", "opt_state", "step")}


def test_a_hopeless_run_stops_with_the_culprit_and_its_last_checkpoint(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precision = {**PRECISION, "initial_scale": 4.0, "min_scale": 2.0, "max_overflows": 2}
    run = small_run(tmp_path, "run", corpus, precision)
    pretrain(run, stop_at=3)
    kept = final_state(run, 3)
    monkeypatch.setitem(ACTIVATIONS, "silu", lambda x: 3e4 * (3e4 * jax.nn.silu(x)))
    with pytest.raises(TrainingStopped, match="2 overflows in a row with the loss scale at its floor") as stop:
        pretrain(run)
    assert "first non-finite value: LlamaLayer[0]: mul in the forward pass" in str(stop.value)
    assert "last good checkpoint is step 3" in str(stop.value)
    assert same_bits(final_state(run, 3), kept)


@pytest.mark.parametrize(("compute", "saved"), [("float32", 3), ("bfloat16", 0)])
def test_a_run_without_a_scale_names_the_value_that_ended_it(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, compute: str, saved: int
) -> None:
    """After the step every parameter is NaN: those of the checkpoint, or of the start, show where it began."""
    run = small_run(tmp_path, "run", corpus, {"compute": compute})
    if saved:
        pretrain(run, stop_at=saved)
    monkeypatch.setitem(ACTIVATIONS, "silu", lambda x: 1e30 * (1e30 * jax.nn.silu(x)))
    with pytest.raises(TrainingStopped, match="loss nan, gradient norm nan") as stop:
        pretrain(run)
    named = f"first non-finite value: LlamaLayer[0]: mul in the forward pass (with the parameters of step {saved})"
    assert named in str(stop.value)
