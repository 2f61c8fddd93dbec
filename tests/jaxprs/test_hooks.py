"""Invariants of `jaxllm.study`: reading changes nothing, an edit equals other parameters, layers are kept apart."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import traceback
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

import jaxllm
from jaxllm.jaxprs.hooks import check_edits
from jaxllm.models.layers import apply
from jaxllm.study import capture, edit, sites

SIZES = {"vocab_size": 31, "d_model": 16, "d_ff": 24, "num_layers": 3, "num_heads": 4, "attention": "reference"}
LLAMA = jaxllm.LlamaConfig(**SIZES, num_kv_heads=2)
T5 = jaxllm.T5Config(**SIZES, head_dim=4, num_decoder_layers=2)
TOKENS = jnp.arange(14).reshape(2, 7) * 5 % 31

Forward = Callable[[Any, jax.Array], jax.Array]


def family(config: Any, **changes: Any) -> tuple[Forward, Any]:
    """Logits as a function of (parameters, tokens), and parameters large enough for layers to matter."""
    model = jaxllm.build(dataclasses.replace(config, **changes))
    params = jaxllm.init_params(model, jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf * 6 if leaf.ndim == 3 else leaf, params)
    twice = config.family == "t5"
    return lambda p, ids: apply(model, p, *[ids] * (1 + twice)), params


WAYS = [{"layers": "scan"}, {"layers": "unroll"}, {"layers": "scan", "remat": "elementwise"}]


@pytest.mark.parametrize("config", [LLAMA, T5], ids=["llama", "t5"])
def test_reading_changes_nothing_and_loops_and_single_layers_agree(config: Any) -> None:
    results = []
    for way in WAYS:
        forward, params = family(config, **way)
        plain, (out, seen) = jax.jit(forward)(params, TOKENS), jax.jit(capture(forward))(params, TOKENS)
        np.testing.assert_allclose(out, plain, atol=1e-6)
        assert {path: value.shape for path, value in seen.items()} == {
            path: value.shape for path, value in sites(forward)(params, TOKENS).items()
        }
        results.append(seen)
    for seen in results[1:]:
        assert seen.keys() == results[0].keys()
        for path, value in seen.items():
            np.testing.assert_allclose(value, results[0][path], rtol=1e-4, atol=1e-5, err_msg=path)


def close(found: Any, want: Any) -> None:
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_what_is_captured_is_the_layers_own_arithmetic() -> None:
    """Residual streams add up, attention weights mix the values, and the head turns the last state into logits."""
    forward, params = family(LLAMA)
    logits, seen = capture(forward)(params, TOKENS)
    seen = {path.removeprefix("layers/"): value for path, value in seen.items()}
    close(seen["input"][0], params["embed"][TOKENS])
    close(seen["input"][1:], seen["after_mlp"][:-1])
    close(seen["after_attention"], seen["input"] + seen["attention_output"])
    close(seen["after_mlp"], seen["after_attention"] + seen["mlp_output"])
    close(seen["neurons"], jax.nn.silu(seen["gate"]) * seen["up"])
    close(seen["mlp_output"], jnp.einsum("lbtf,lfd->lbtd", seen["neurons"], params["layers"]["down_proj"]["kernel"]))
    values = jnp.repeat(seen["value"], 2, axis=3)
    close(seen["heads"], jnp.einsum("lbnts,lbsnh->lbtnh", seen["attention_weights"], values))
    close(seen["attention_weights"].sum(-1), 1)
    x = seen["after_mlp"][-1]
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + LLAMA.norm_eps) * params["final_norm"]["weight"]
    close(logits, x @ params["lm_head"].T)


@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize("config", [LLAMA, T5], ids=["llama", "t5"])
def test_a_head_without_output_is_one_without_output_weights(config: Any, way: dict[str, Any]) -> None:
    forward, params = family(config, **way)
    without = edit(forward, {"heads": lambda x, layer: jnp.where(layer == 1, x.at[:, :, 2].set(0), x)})

    def cut(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf.at[1, 8:12].set(0) if "o_proj" in jax.tree_util.keystr(path) else leaf

    want = forward(jax.tree_util.tree_map_with_path(cut, params), TOKENS)
    found = jax.jit(without)(params, TOKENS)
    close(found, want)
    assert jnp.abs(found - forward(params, TOKENS)).max() > 0.01


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_a_model_that_runs_twice_numbers_its_layers_twice(layers: str) -> None:
    forward, params = family(LLAMA, layers=layers)
    without = {"heads": lambda x, layer: jnp.where(layer == 1, x.at[:, :, 2].set(0), x)}
    once, seen = capture(edit(forward, without), "heads")(params, TOKENS)
    twice, both = capture(edit(lambda p, ids: forward(p, ids) + forward(p, ids), without), "heads")(params, TOKENS)
    close(twice, 2 * once)
    close(both["layers/heads"], jnp.concatenate([seen["layers/heads"]] * 2))


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_numbered_scopes_around_a_model_are_not_its_layers(layers: str) -> None:
    forward, params = family(LLAMA, layers=layers)
    without = edit(jax.named_scope("7")(forward), {"heads": lambda x, layer: jnp.where(layer == 1, 0, x)})
    want = edit(forward, {"heads": lambda x, layer: jnp.where(layer == 1, 0, x)})(params, TOKENS)
    close(jax.jit(without)(params, TOKENS), want)
    assert jnp.abs(want - forward(params, TOKENS)).max() > 0.01


def test_loops_over_own_layers_have_sites() -> None:
    """Flax gives them any name, and a plain scan gives none."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return checkpoint_name(2 * x, "h"), None

    stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(name="blocks")
    plain = functools.partial(jax.lax.scan, lambda x, _: (checkpoint_name(2 * x, "h"), None), xs=None, length=3)
    for path, run in (("blocks/h", lambda x: stack.apply({}, x, None)), ("h", plain)):
        _, seen = capture(run)(jnp.ones(2))
        assert list(seen) == [path]
        close(seen[path], [[2, 2], [4, 4], [8, 8]])


def test_results_are_arrays_whatever_the_function_returns() -> None:
    def function(p: Any, ids: Any) -> Any:
        return FORWARD(p, ids), ids, 3, jax.random.key(0)

    (_, *found), _ = capture(function, "heads")(PARAMS, np.asarray(TOKENS, np.int64))
    assert all(isinstance(value, jax.Array) for value in found)
    assert [str(value.dtype) for value in found] == ["int32", "int32", "key<fry>"]


def test_a_name_means_all_sites_that_end_in_it() -> None:
    forward, params = family(T5)
    paths = set(sites(forward)(params, TOKENS))
    assert {path for path in paths if path.endswith("/query")} == {
        "encoder/layers/attention/query",
        "decoder/layers/attention/query",
        "decoder/layers/cross_attention/query",
    }
    assert set(capture(forward, "query")(params, TOKENS)[1]) == {path for path in paths if path.endswith("/query")}
    one = capture(forward, "cross_attention/query", "encoder/layers/input")(params, TOKENS)[1]
    assert set(one) == {"decoder/layers/cross_attention/query", "encoder/layers/input"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("config", [LLAMA, dataclasses.replace(T5, tie_embeddings=True, scale_logits=True)])
def test_the_lens_reads_the_logits_off_the_last_stream(config: Any, dtype: str) -> None:
    model = jaxllm.build(config, dtype=dtype)
    params = jaxllm.init_params(model, jax.random.key(0))
    inputs = [TOKENS] * (1 + (config.family == "t5"))
    logits, seen = capture(lambda: apply(model, params, *inputs), "after_mlp")()
    last = next(value for path, value in seen.items() if "encoder" not in path)[-1]
    np.testing.assert_array_equal(apply(model, params, last, method="lens"), logits)


def test_a_patched_state_carries_another_run_over() -> None:
    forward, params = family(LLAMA)
    other = TOKENS[::-1]
    want, seen = capture(forward, "after_mlp")(params, other)
    states = seen["layers/after_mlp"]
    patched = edit(forward, {"after_mlp": lambda x, layer: jnp.where(layer == 1, states[layer], x)})
    # What comes after layer 1 sees only its output; captured after the edit, the layers before it are the first run's.
    found, mixed = capture(patched, "after_mlp")(params, TOKENS)
    close(found, want)
    close(mixed["layers/after_mlp"][1:], states[1:])
    close(mixed["layers/after_mlp"][0], states[0][::-1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_those_of_the_function(dtype: str) -> None:
    """And a shift of the first input has the gradient of the embedding."""
    model = jaxllm.build(LLAMA, dtype=dtype)
    params = jaxllm.init_params(model, jax.random.key(0))

    def loss(p: Any) -> jax.Array:
        return jnp.sum(jax.nn.log_softmax(apply(model, p, TOKENS))[..., 3])

    def shifted(p: Any, shift: jax.Array) -> jax.Array:
        return edit(loss, {"input": lambda x, layer: x + jnp.where(layer == 0, shift, 0)})(p)

    zero = jnp.zeros((*TOKENS.shape, LLAMA.d_model), dtype)
    grads, shift = jax.jit(jax.grad(shifted, (0, 1)))(params, zero)
    want = jax.jit(jax.grad(loss))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), grads, want)
    np.testing.assert_allclose(shift.astype(jnp.float32), want["embed"][TOKENS], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("remat", ["elementwise", "full"])
def test_what_is_rematerialised_still_is(remat: str) -> None:
    """By the bytes that a gradient's program holds, and its numbers."""
    tokens = jnp.tile(TOKENS, (8, 8))

    def gradients(remat: str) -> tuple[Any, list[int]]:
        forward, params = family(LLAMA, num_layers=6, remat=remat)
        changed = capture(edit(forward, {"neurons": lambda x, layer: x * jnp.where(layer == 1, 2, 1)}), "heads")
        losses = [lambda p: forward(p, tokens).mean(), lambda p: changed(p, tokens)[0].mean()]
        plain, edited = (jax.jit(jax.grad(loss)).lower(params).compile() for loss in losses)
        return edited(params), [grad.memory_analysis().temp_size_in_bytes for grad in (plain, edited)]

    (found, (plain, edited)), (want, (_, without)) = gradients(remat), gradients("none")
    assert edited < 1.1 * plain < 0.8 * without
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, want)


def test_a_sweep_over_layers_and_heads_is_one_vmap() -> None:
    forward, params = family(LLAMA)

    def without(at: jax.Array, head: jax.Array) -> jax.Array:
        off = {"heads": lambda x, layer: jnp.where((layer == at) & (jnp.arange(4) == head)[:, None], 0, x)}
        return edit(forward, off)(params, TOKENS)

    at, head = jnp.divmod(jnp.arange(12), 4)
    swept = jax.jit(jax.vmap(without))(at, head)
    for i in (0, 6, 11):
        close(swept[i], without(at[i], head[i]))
    assert jnp.abs(swept - forward(params, TOKENS)).max((1, 2, 3)).min() > 0.001


def test_a_new_value_takes_the_dtype_of_the_old_one() -> None:
    model = jaxllm.build(LLAMA, dtype="bfloat16")
    params = jaxllm.init_params(model, jax.random.key(0))
    wider = edit(lambda p: apply(model, p, TOKENS), {"neurons": lambda x, _: x.astype(jnp.float32) * 2})
    _, seen = capture(wider, "neurons")(params)
    assert seen["layers/neurons"].dtype == jnp.bfloat16


FORWARD, PARAMS = family(LLAMA)
UNROLLED, _ = family(LLAMA, layers="unroll")
OWN_SLOPE = jax.custom_vjp(FORWARD)
OWN_SLOPE.defvjp(lambda p, ids: (FORWARD(p, ids), p), lambda p, grad: (p, None))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: capture(FORWARD, "head"),
            r"'head' is not a hook point of the function; known: layers/input, ",
        ),
        (lambda: edit(FORWARD, {"head": lambda x, _: x}), r"'head' is not a hook point"),
        (lambda: edit(FORWARD, {"heads": lambda x, _: x[:1]}), r"heads must keep the shape \[2, 7, 4, 4\], got \[1, "),
        (lambda: capture(lambda p, ids: ids * 2, "heads"), r"none: it runs no model"),
        (
            lambda: capture(family(LLAMA, attention="chunked")[0], "attention_weights"),
            r"build the model with `attention: ref",
        ),
        (lambda: capture(jax.grad(lambda p, ids: FORWARD(p, ids).sum())), r"is in a gradient"),
        (
            lambda: capture(lambda p, ids: jax.lax.map(lambda i: FORWARD(p, i), ids[None])),
            r"in a loop not over layers",
        ),
        (
            lambda: capture(lambda p, ids: jax.lax.map(lambda i: UNROLLED(p, i), ids[None])),
            r"in a loop not over layers",
        ),
        (lambda: capture(OWN_SLOPE), r"a hook point is inside custom_vjp_call"),
        (
            lambda: capture(FORWARD, ["heads"]),
            r"\['heads'\] is not a hook point of the function; known: layers/input, ",
        ),
        (lambda: edit(FORWARD, {"heads": lambda x, _: None}), r"the edit of layers/heads returns None"),
        (
            lambda: edit(FORWARD, {"heads": lambda x: x}),
            r"the edit of heads must be a function of \(value, layer\), e\.g\. lambda value, layer: 2 \* value; too",
        ),
        (lambda: edit(FORWARD, {"heads": 3}), r"must be a function of \(value, layer\).* 3 is not a callable object"),
        (lambda: edit(FORWARD, {"heads": lambda x, layer: x * 2 if layer == 1 else x}), r"by jnp\.where\(layer == 1, "),
        (lambda: edit(FORWARD, {"heads": lambda x, layer: x * [1, 2, 3][layer]}), r"by jnp\.where\(layer == 1, new, v"),
        (lambda: edit(FORWARD, {"heads": lambda x, _: np.tanh(x)}), r"compute by jax\.numpy alone"),
        (lambda: edit(lambda p, ids: jax.lax.cond(True, FORWARD, FORWARD, p, ids), {}), r"a hook point is inside cond"),
    ],
)
def test_errors(call: Callable[[], Callable[..., Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()(PARAMS, TOKENS)


def broken(heads: jax.Array, layer: Any) -> jax.Array:
    return heads @ jnp.ones((7, 7))


@pytest.mark.parametrize("wrapped", [lambda f: f, jax.jit, lambda f: edit(f, {"query": lambda x, _: x})])
def test_an_error_of_an_edit_is_its_own_with_few_lines_around_it(wrapped: Callable[..., Any]) -> None:
    """Its type and text stay; of the interpreter and of jax, the traceback has a few frames."""
    with pytest.raises(TypeError, match="contracting dimensions") as caught:
        wrapped(edit(FORWARD, {"heads": broken}))(PARAMS, TOKENS)
    frames = [frame for frame in traceback.extract_tb(caught.tb) if "/site-packages/_pytest/" not in frame.filename]
    assert len(frames) < 16 and "return heads @ jnp.ones((7, 7))" in [frame.line for frame in frames]
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_an_edit_may_be_a_builtin_without_a_signature() -> None:
    with pytest.raises(ValueError, match="no signature found"):
        inspect.signature(max)
    check_edits({"heads": max})
