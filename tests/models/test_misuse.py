"""Wrong calls are refused by name, while tracing at the latest, instead of computing something else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax.errors import ApplyScopeInvalidVariablesTypeError

from jaxllm.config import LlamaConfig, T5Config, TrainingConfig
from jaxllm.generation import BeamSettings, Sampling, beam_search, generate, generate_stream, score
from jaxllm.models import Model, abstract_params, build, init_params
from jaxllm.models.llama.decode import prepare_for_decode
from jaxllm.models.t5.layer import stream_dtype
from jaxllm.ops.losses import chunked_cross_entropy
from jaxllm.training.loss import build_loss

LLAMA = LlamaConfig(vocab_size=50, d_model=16, d_ff=24, num_layers=2, num_heads=4, num_kv_heads=2, max_length=32)
T5 = T5Config(vocab_size=50, d_model=16, d_ff=24, num_layers=2, num_heads=2, head_dim=8)
TOKENS = jnp.ones((2, 6), jnp.int32)


@pytest.fixture(autouse=True)
def untyped() -> Iterator[None]:
    """A user has no type checker at run time, which the tests put around every call."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def params_of(config: LlamaConfig | T5Config) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_params(build(config)))


def call(model: Model, params: Any, tokens: Any = TOKENS, **inputs: Any) -> Any:
    """The model's logits, traced only."""
    many = (tokens, tokens) if model.config.family == "t5" else (tokens,)
    return jax.eval_shape(lambda: model.apply({"params": params}, *many, **inputs))


OTHERS = {
    "depth": (LLAMA, dataclasses.replace(LLAMA, num_layers=1)),
    "tied": (dataclasses.replace(LLAMA, tie_embeddings=True), LLAMA),
    "bias": (LLAMA, dataclasses.replace(LLAMA, qkv_bias=True)),
    "head norms": (LLAMA, dataclasses.replace(LLAMA, qk_norm=True)),
    "width": (LLAMA, dataclasses.replace(LLAMA, d_model=32)),
    "vocabulary": (LLAMA, dataclasses.replace(LLAMA, vocab_size=60)),
    "t5 depth": (T5, dataclasses.replace(T5, num_layers=1)),
    "t5 decoder depth": (T5, dataclasses.replace(T5, num_decoder_layers=1)),
    "t5 tied": (dataclasses.replace(T5, tie_embeddings=True), T5),
    "t5 gate": (dataclasses.replace(T5, gated=False), T5),
    "t5 bias per layer": (dataclasses.replace(T5, relative_per_layer=True), T5),
}


@pytest.mark.parametrize("case", OTHERS)
def test_parameters_of_another_model_are_refused(case: str) -> None:
    config, other = OTHERS[case]
    model, params = build(config), params_of(other)
    with pytest.raises(Exception, match=r"the parameters hold|ScopeParam|expected to generate shape|Could not find"):
        call(model, params)
    for decode in (
        lambda: generate(model, params, [[1, 2]], max_new_tokens=2),
        lambda: beam_search(model, params, [[1, 2]], max_new_tokens=2, search=BeamSettings(beams=2)),
        lambda: score(model, params, [[1, 2]], [[3]]),
    ):
        with pytest.raises(ValueError, match="the parameters are not those of the model"):
            decode()


def test_prepared_parameters_are_not_scored() -> None:
    prepared = prepare_for_decode(params_of(LLAMA), dtype=jnp.float32)
    with pytest.raises(ValueError, match="must be a dict as init_params and load_run give, got LlamaParams"):
        score(build(LLAMA), prepared, [[1, 2]], [[3]])


def test_prepared_parameters_of_another_depth_are_refused() -> None:
    other = dataclasses.replace(LLAMA, num_layers=1)
    prepared = prepare_for_decode(params_of(other), dtype=jnp.float32)
    with pytest.raises(ValueError, match="prepared parameters are not those of the model"):
        generate(build(LLAMA), prepared, [[1, 2]], max_new_tokens=2)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (jnp.ones(6, jnp.int32), r"got int32\[6\]; a single row is \w*tokens\[None\]"),
        (jnp.ones((1, 2, 6), jnp.int32), r"got int32\[1, 2, 6\]"),
        (jnp.ones((2, 6)), r"got float32\[2, 6\]"),
        (jnp.ones((2, 6), bool), r"got bool\[2, 6\]"),
        (jnp.ones((2, 0), jnp.int32), r"got int32\[2, 0\]"),
        ([[1, 2]], "got list; use jnp.asarray"),
    ],
)
@pytest.mark.parametrize("config", [LLAMA, T5], ids=["llama", "t5"])
def test_tokens_that_are_no_rows_of_ids_are_refused(config: Any, tokens: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(build(config), params_of(config), tokens)


@pytest.mark.parametrize(
    ("config", "name", "shape"),
    [
        (LLAMA, "positions", (6,)),
        (LLAMA, "positions", (2, 5)),
        (LLAMA, "segment_ids", (3, 6)),
        (T5, "encoder_segment_ids", (2, 5)),
        (T5, "decoder_segment_ids", (1, 6)),
    ],
)
def test_inputs_of_other_shapes_than_the_tokens_are_refused(config: Any, name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"{name} must be of shape .*2, 6.*, got"):
        call(build(config), params_of(config), **{name: jnp.ones(shape, jnp.int32)})


def test_lengths_of_sources_are_one_per_row_and_stand_alone() -> None:
    t5, lengths = (build(T5), params_of(T5)), jnp.ones((2,), jnp.int32)
    with pytest.raises(ValueError, match=r"encoder_lengths must be of shape \[2\], got \[3\]"):
        call(*t5, encoder_lengths=jnp.ones((3,), jnp.int32))
    with pytest.raises(ValueError, match=r"encoder_lengths must be integers, got float32"):
        call(*t5, encoder_lengths=jnp.ones((2,)))
    for name in ("encoder_segment_ids", "decoder_segment_ids"):
        with pytest.raises(ValueError, match=r"give them or segment ids, not both"):
            call(*t5, encoder_lengths=lengths, **{name: jnp.ones((2, 6), jnp.int32)})


def test_an_encoder_output_of_another_batch_is_refused() -> None:
    model, params = build(T5), params_of(T5)
    encoded = jnp.zeros((3, 5, T5.d_model))
    with pytest.raises(ValueError, match=r"the encoder's output must be of shape \[2, 5, 16\] or \[1, 5, 16\], got"):
        jax.eval_shape(lambda: model.apply({"params": params}, TOKENS, encoded, method="decode"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [1, 2, 3]}, r"prompt 0 must be a list of token ids such as \[1, 2, 3\], got '1'"),
        ({"prompts": "text"}, "prompt 0 must be a list of token ids"),
        ({"prompts": [[1.5, 2.5]]}, "prompt 0 must be a list of token ids"),
        ({"prompts": [[1], [True, False]]}, "prompt 1 must be a list of token ids"),
        ({"prompts": np.array([1, 2])}, "prompt 0 must be a list of token ids"),
        ({"max_new_tokens": 4.0}, "max_new_tokens must be a whole number, got 4.0"),
        ({"eos_ids": np.int64(3)}, r"eos_ids must be a list of ids, e.g. \[3\]"),
        ({"eos_ids": 3}, r"eos_ids must be a list of ids, e.g. \[3\]"),
        ({"eos_ids": [5.7]}, r"eos_ids\[0\] must be a whole number, got 5.7"),
        ({"eos_ids": jnp.array([5])}, r"eos_ids\[0\] must be a whole number, got Array"),
        ({"pad_id": None}, "pad_id must be a whole number, got None"),
        ({"sampling": 0.5}, r"sampling must be a Sampling, e.g. Sampling\(temperature=0.8\), got 0.5"),
        ({"seed": 1.5}, r"seed must be a whole number in 0\.\.2\*\*32 - 1, got 1\.5"),
        ({"seed": jax.random.key(0)}, "seed must be a whole number, or one per prompt, got a key"),
        ({"model": {}}, "must be a model as `build` makes it, got dict"),
    ],
)
def test_a_generation_that_cannot_be_meant_is_refused(arguments: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {"model": build(LLAMA), "params": params_of(LLAMA), "prompts": [[1]], "max_new_tokens": 2}
    with pytest.raises(ValueError, match=message):
        generate(**{**asked, **arguments})


def test_a_traced_prompt_or_seed_is_refused() -> None:
    model, params = build(LLAMA), params_of(LLAMA)
    with pytest.raises(ValueError, match=r"call it outside jax\.jit"):
        jax.jit(lambda rows: jnp.asarray(generate(model, params, rows, max_new_tokens=2)))(TOKENS)
    with pytest.raises(ValueError, match=r"call it outside jax\.jit"):
        jax.vmap(lambda seed: jnp.asarray(generate(model, params, [[1]], max_new_tokens=2, seed=seed)))(jnp.arange(2))


def test_beam_search_names_its_settings() -> None:
    search: Any = 4
    with pytest.raises(ValueError, match=r"search must be a BeamSettings, e.g. BeamSettings\(beams=4\), got 4"):
        beam_search(build(LLAMA), params_of(LLAMA), [[1]], max_new_tokens=2, search=search)


def test_numbers_of_numpy_are_numbers() -> None:
    model, params, drawn = build(LLAMA), params_of(LLAMA), Sampling(temperature=1.0)
    want = generate(model, params, [[1, 2]], max_new_tokens=4, sampling=drawn, seed=3)
    for seed in (np.int64(3), jnp.int32(3)):
        given: Any = seed
        count: Any = np.int64(4)
        assert generate(model, params, np.array([[1, 2]]), max_new_tokens=count, sampling=drawn, seed=given) == want


@pytest.mark.parametrize(
    ("settings", "number", "message"),
    [
        (Sampling, {"temperature": "1"}, "temperature must be of type float, got '1'"),
        (Sampling, {"temperature": 1.0, "top_k": 5.0}, r"top_k must be of type int\|null, got 5.0"),
        (Sampling, {"temperature": True}, "temperature must be of type float, got True"),
        (Sampling, {"temperature": None}, "temperature must be of type float, got None"),
        (Sampling, {"min_new_tokens": 2.0}, "min_new_tokens must be of type int, got 2.0"),
        (BeamSettings, {"beams": 4.0}, "beams must be of type int, got 4.0"),
        (BeamSettings, {"beams": 4, "length_penalty": "1"}, "length_penalty must be of type float, got '1'"),
        (BeamSettings, {"beams": 4, "returned": 2.0}, "returned must be of type int, got 2.0"),
        (BeamSettings, {"beams": 4, "early_stopping": "always"}, r"early_stopping must be of type bool\|never, got"),
    ],
)
def test_settings_of_decoding_are_numbers(settings: Any, number: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**number)


def test_settings_of_decoding_take_numbers_of_numpy_and_jax() -> None:
    """They are static arguments, so they must be hashable, and equal ones must share a compiled program."""
    drawn: Any = Sampling
    for one in (np.float32(0.5), jnp.float32(0.5), np.float64(0.5)):
        assert hash(drawn(temperature=one, top_k=np.int64(5))) == hash(Sampling(temperature=0.5, top_k=5))
    assert drawn(temperature=jnp.int32(1)) == Sampling(temperature=1.0)
    beams: Any = BeamSettings
    assert hash(beams(beams=jnp.int32(4), length_penalty=jnp.float32(2))) == hash(
        BeamSettings(beams=4, length_penalty=2)
    )


@pytest.mark.parametrize("wrong", [{"config": {"vocab_size": 3}}, {"dtype": jnp.int32}, {"dtype": "half-ish"}])
def test_build_refuses_what_is_no_model(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"build needs a LlamaConfig|dtype must be float32, bfloat16 or float16"):
        build(**{"config": LLAMA, **wrong})


@pytest.mark.parametrize(
    ("key", "got"),
    [(0, "0"), (np.int32(7), "7"), (None, "None"), (jax.random.split(jax.random.key(0), 3), r"key<fry>\[3\]")],
)
def test_init_params_says_what_a_key_is(key: Any, got: str) -> None:
    with pytest.raises(ValueError, match=rf"key must be one key, e.g. jax.random.key\(0\), got .*{got}"):
        init_params(build(LLAMA), key)


def test_a_bound_model_initialises_as_itself() -> None:
    bound = build(LLAMA).bind({"params": params_of(LLAMA)})
    assert jax.tree.structure(init_params(bound, jax.random.key(0))) == jax.tree.structure(params_of(LLAMA))


def test_init_params_takes_a_model() -> None:
    config: Any = LLAMA
    with pytest.raises(ValueError, match="the first argument must be a model as `build` makes it, got LlamaConfig"):
        init_params(config, jax.random.key(0))
    old = init_params(build(LLAMA), jax.random.PRNGKey(3))
    new = init_params(build(LLAMA), jax.random.key(3))
    assert all(map(np.array_equal, jax.tree.leaves(old), jax.tree.leaves(new)))


@pytest.mark.parametrize("config", [LLAMA, T5], ids=["llama", "t5"])
def test_variables_are_told_from_parameters(config: LlamaConfig | T5Config) -> None:
    with pytest.raises(ValueError, match=r"missing: .*; pass variables\[\"params\"\]"):
        generate(build(config), {"params": params_of(config)}, [[1]], max_new_tokens=2)


@pytest.mark.parametrize("config", [LLAMA, T5], ids=["llama", "t5"])
def test_parameters_are_told_from_variables(config: LlamaConfig | T5Config) -> None:
    model, params = build(config), params_of(config)
    with pytest.raises(ValueError, match=r'got parameters \(.*embed.*\); write model.apply\({"params": params}, ...\)'):
        model.apply(params, TOKENS)
    with pytest.raises(ApplyScopeInvalidVariablesTypeError):  # another mistake keeps Flax's error
        model.apply({"params": 3}, TOKENS)


@pytest.mark.parametrize("function", [generate, generate_stream])
def test_settings_of_sampling_are_not_arguments_of_a_generation(function: Any) -> None:
    model, params = build(LLAMA), params_of(LLAMA)
    with pytest.raises(TypeError, match=r"as one argument: sampling=Sampling\(temperature=1.0, top_k=5\)"):
        function(model, params, [[1]], max_new_tokens=2, top_k=5, temperature=1.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_token'"):
        function(model, params, [[1]], max_new_tokens=2, max_token=1)


def test_flaxs_dropout_key_is_not_left_unread() -> None:
    """T5 would compute without dropout, silently."""
    model = build(dataclasses.replace(T5, dropout_rate=0.1))
    for method in ("__call__", "hidden"):
        with pytest.raises(ValueError, match=r"dropout takes key=, not rngs"):
            call(model, params_of(T5), method=method, rngs={"dropout": jax.random.key(0)})


@pytest.mark.parametrize(
    "config", [LLAMA, T5, dataclasses.replace(T5, tie_embeddings=True)], ids=["llama", "t5", "tied"]
)
def test_parameters_may_be_numpys(config: LlamaConfig | T5Config) -> None:
    params = init_params(build(config), jax.random.key(0))
    plain = jax.tree.map(np.asarray, params)
    rows = dict.fromkeys(("tokens", "encoder_tokens", "decoder_tokens", "targets"), np.asarray(TOKENS))
    loss, rows = build_loss(build(config), TrainingConfig()), rows | {"weights": np.ones((2, 6), np.float32)}
    assert float(loss(plain, rows, None).loss) == float(loss(params, rows, None).loss)


@pytest.mark.parametrize("dtype", ["float16", np.float16, np.dtype("float16"), jnp.float16])
def test_t5s_stream_is_float32_under_every_spelling_of_float16(dtype: Any) -> None:
    assert stream_dtype(dtype) == jnp.float32


@pytest.mark.parametrize("name", ["targets", "weights"])
def test_a_loss_names_what_has_another_shape_than_the_tokens(name: str) -> None:
    arrays: dict[str, Any] = {"targets": jnp.zeros((2, 6), jnp.int32), "weights": jnp.zeros((2, 6))}
    arrays[name] = arrays[name].T
    with pytest.raises(ValueError, match=rf"{name} must be of shape \[2, 6\], got \[6, 2\]"):
        chunked_cross_entropy(jnp.zeros((2, 6, 4)), jnp.zeros((9, 4)), **arrays)


def test_segment_ids_are_optional_in_a_batch_of_either_family() -> None:
    ones = jnp.ones((2, 6), jnp.int32)
    rows = {"targets": TOKENS, "weights": jnp.ones((2, 6)), "encoder_tokens": TOKENS, "decoder_tokens": TOKENS}
    loss, params = build_loss(build(T5), TrainingConfig()), init_params(build(T5), jax.random.key(0))
    packed = loss(params, {**rows, "encoder_segment_ids": ones, "decoder_segment_ids": ones}, None)
    assert float(loss(params, rows, None).loss) == pytest.approx(float(packed.loss), rel=1e-6)


@pytest.mark.parametrize("wrong", [-1, 50])
@pytest.mark.parametrize("config", [LLAMA, T5], ids=["llama", "t5"])
def test_an_id_outside_the_vocabulary_is_not_taken_for_another(config: LlamaConfig | T5Config, wrong: int) -> None:
    """Indexing would read the nearest row, or count from the end."""
    model = build(config)
    tokens = TOKENS.at[0, 3].set(wrong)
    logits = model.apply({"params": params_of(config)}, *([tokens, tokens] if config is T5 else [tokens]))
    assert np.isnan(np.asarray(logits[0, 3])).all() and np.isfinite(np.asarray(logits[1])).all()
