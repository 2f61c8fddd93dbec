"""T5-shaped variants against transformers itself: directories both ways, sharded and bfloat16, and low precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.interop.hf import SpecialIds, load_hf_config
from jaxllm.models.t5 import layer as t5_layers
from jaxllm.models.t5 import model as t5
from jaxllm.models.t5.model import Documents
from jaxllm.ops.positions import relative_bucket
from jaxllm.study import capture
from tests.parity import t5_cases as cases

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("tests.parity.torch_t5")

# torch and transformers warn about themselves.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize("name", cases.CASES)
def test_logits_loss_and_every_gradient(name: str, t5_numbers: Callable[[str], cases.Numbers]) -> None:
    """The recorded greedy tokens, which ours are compared with, are also those of this version."""
    model = theirs.build(name)
    ours, want = t5_numbers(name), theirs.numbers(model)
    assert cases.logit_error(ours.logits, want.logits) < cases.LOGITS
    assert ours.loss == pytest.approx(want.loss, rel=1e-5)
    assert ours.grads.keys() == want.grads.keys()
    for key, grad in want.grads.items():
        assert np.abs(grad).max() > 0, key
        assert np.abs(ours.grads[key] - grad).max() < cases.GRADS * np.abs(grad).max(), key
    assert theirs.greedy(model) == cases.load_golden(name)["greedy"].tolist()


@pytest.mark.parametrize("buckets", [5, 7, 33])
def test_odd_numbers_of_buckets_are_read_and_computed_as_there(
    buckets: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"relative_attention_num_buckets": buckets, "relative_attention_max_distance": 20}
    monkeypatch.setitem(cases.CASES, "odd", ("t5", settings))
    model = theirs.build("odd")
    model.save_pretrained(tmp_path)
    ours, want = cases.our_numbers(tmp_path), theirs.numbers(model)
    assert cases.logit_error(ours.logits, want.logits) < cases.LOGITS
    for key, grad in want.grads.items():
        assert np.abs(ours.grads[key] - grad).max() < cases.GRADS * np.abs(grad).max(), key
    assert cases.our_greedy(tmp_path) == theirs.greedy(model)
    attention = model.encoder.block[0].layer[0].SelfAttention
    distance = np.arange(-60, 61)
    for both in (True, False):
        bucket = attention._relative_position_bucket(torch.tensor(distance), both, buckets, 20)
        found = relative_bucket(distance, buckets=buckets, max_distance=20, bidirectional=both)
        assert found.tolist() == bucket.tolist()


@pytest.mark.parametrize("name", ("v1_0_eps_start", "deep_decoder", "umt5"))
def test_hidden_states_and_attention_maps(name: str, t5_directory: Callable[[str], Path]) -> None:
    """At real tokens of the encoder: the values at padding differ, and no attention reads them."""
    model, params = jaxllm.load_hf(t5_directory(name))
    want, real = theirs.inside(theirs.build(name)), cases.source_mask()
    vocab = model.config.vocab_size
    tokens = cases.source(vocab), cases.decoder_tokens(model.config.decoder_start_id, vocab)
    last, documents = want.pop("last"), Documents(jnp.asarray(real))
    hidden = capture(lambda p, a, b: model.apply({"params": p}, a, b, documents, method="hidden"), *want)
    found, seen = jax.jit(hidden)(params, *tokens)
    scaled = model.config.d_model**-0.5 if model.config.scale_logits else 1
    assert cases.logit_error(found, scaled * last) < cases.LOGITS * scaled
    assert seen.keys() == want.keys()
    for key, value in want.items():
        queries = real.astype(bool) if key.startswith("encoder") else np.ones(tokens[1].shape, bool)
        kept = queries[None, :, :, None] if key.endswith("input") else queries[None, :, None, :, None]
        assert seen[key].shape == value.shape
        assert cases.logit_error(jnp.where(kept, seen[key], 0), np.where(kept, value, 0)) < cases.LOGITS, key


@pytest.mark.parametrize("name", cases.CASES)
def test_directories_of_transformers_open_here_and_ours_there(name: str, tmp_path: Path) -> None:
    """In bfloat16 and in shards on the way back; nothing may change by one bit."""
    built = theirs.build(name)
    built.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    model, params = jaxllm.load_hf(tmp_path / "theirs")
    tied = "tie_word_embeddings" not in cases.settings(name)
    assert (model.config.tie_embeddings, model.config.scale_logits) == (tied, tied)
    np.testing.assert_array_equal(params["embed"], cases.weight("shared.weight", params["embed"].shape))

    ids = SpecialIds(eos=(1,), pad=0)
    jaxllm.save_hf(tmp_path / "ours", model, params, dtype="bfloat16", shard_bytes=20_000, special_ids=ids)
    assert load_hf_config(tmp_path / "ours") == model.config
    opened = theirs.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    low = built.bfloat16()
    assert opened.dtype == torch.bfloat16
    assert opened.generation_config.decoder_start_token_id == model.config.decoder_start_id
    for key, value in low.state_dict().items():
        assert torch.equal(opened.state_dict()[key], value), key
    np.testing.assert_array_equal(theirs.logits(opened), theirs.logits(low))


@pytest.mark.parametrize("name", ["v1_0", "v1_1", "umt5"])
def test_dropout_stands_where_transformers_has_it(
    name: str, t5_directory: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function replaces dropout on both sides. It is not a scale, which could move across a matmul unnoticed."""
    monkeypatch.setattr(
        torch.nn.functional,
        "dropout",
        lambda x, p, training, inplace=False: x + 0.3 * torch.sin(2 * x) if training else x,
    )
    for module in (t5, t5_layers):
        monkeypatch.setattr(
            module, "dropout", lambda x, key, *, rate: x if key is None else x + 0.3 * jax.numpy.sin(2 * x)
        )
    want = theirs.logits(theirs.build(name).train())
    model, params = jaxllm.load_hf(t5_directory(name))
    assert cases.logit_error(cases.our_logits(model, params, key=jax.random.key(0)), want) < cases.LOGITS
    assert cases.logit_error(cases.our_logits(model, params), want) > 100 * cases.LOGITS


LOW = ("v1_0", "v1_1", "deep_decoder", "umt5")


def test_bfloat16_is_no_farther_from_the_truth_than_transformers(tmp_path: Path) -> None:
    """RMS error against float64 on the same bfloat16 weights, over four variants."""
    ours, others = [], []
    for name in LOW:
        low = theirs.build(name, torch.bfloat16)
        low.save_pretrained(tmp_path / name)
        model, params = jaxllm.load_hf(tmp_path / name)
        assert model.dtype == jax.numpy.bfloat16
        other = theirs.logits(low)
        truth = theirs.logits(low.double())
        ours.append(np.mean((cases.our_logits(model, params).astype(np.float64) - truth) ** 2))
        others.append(np.mean((other - truth) ** 2))
    print(np.sqrt(ours), np.sqrt(others))
    assert 0 < np.sqrt(np.mean(ours)) <= np.sqrt(np.mean(others))
