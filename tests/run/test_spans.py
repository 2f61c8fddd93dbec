"""Spans are counted whole, and the sample puts answers where their blanks are."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from jaxllm.config.file import parse_config
from jaxllm.data.tokenizer import Tokenizer, encode_blanks, train_tokenizer
from jaxllm.generation.text import filled_in
from jaxllm.training.program import program_of
from jaxllm.training.spans import count_spans, make_predict_step

SENTINELS = np.array([99, 98, 97])
#                    S0  a  b  S1  c end | S0 d  end pad
TARGETS = np.array([[99, 5, 6, 98, 7, 1, 99, 8, 1, 0]])
SEGMENTS = np.array([[1, 1, 1, 1, 1, 1, 2, 2, 2, 0]])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(iter(["def name(self): return self.name\n" * 9]), vocab_size=400)


def guess(*wrong: int) -> tuple[int, int]:
    predicted = TARGETS.copy()
    predicted[0, list(wrong)] = 50
    return count_spans(predicted, TARGETS, SEGMENTS, SENTINELS)


@pytest.mark.parametrize(
    ("wrong", "exact"),
    [((), 3), ((0, 6), 3), ((1,), 2), ((3,), 2), ((5,), 2), ((2, 4), 1), ((9,), 3), ((1, 4, 7), 0), ((8,), 2)],
)
def test_a_span_is_its_tokens_and_the_mark_after(wrong: tuple[int, ...], exact: int) -> None:
    assert guess(*wrong) == (exact, 3)


def test_an_answer_without_sentinels_is_one_span() -> None:
    targets = np.array([[5, 6, 1, 7, 1, 0]])
    segments = np.array([[1, 1, 1, 2, 2, 0]])
    predicted = np.array([[5, 6, 1, 9, 1, 9]])
    assert count_spans(predicted, targets, segments, SENTINELS) == (1, 2)
    assert count_spans(predicted[:, :0], targets[:, :0], segments[:, :0], SENTINELS) == (0, 0)


@pytest.mark.parametrize("precision", [{"compute": "bfloat16"}, {"compute": "float16", "loss_scale": "dynamic"}])
def test_predictions_are_those_that_the_accuracy_counts(precision: dict[str, str]) -> None:
    """Both are of float32 logits, as those of decoding are."""
    model = {"family": "t5", "vocab_size": 4000, "d_model": 64, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    sections = {"model": model, "precision": precision, "training": {"batch_size": 16}}
    program = program_of(
        parse_config(sections | {"data": {"objective": "span_corruption", "sequence_length": 256}}), None
    )
    params = jax.jit(program.fresh_state)().params
    rng = np.random.default_rng(0)
    batch = {name: rng.integers(1, 3, x.shape).astype(x.dtype) for name, x in program.abstract_batch().items()}
    batch |= {name: rng.integers(3, 4000, x.shape, np.int32) for name, x in batch.items() if name.endswith("inputs")}
    predicted = np.asarray(jax.jit(make_predict_step(program, None))(params, batch))
    found = jax.jit(program.eval_step)(params, {**batch, "targets": predicted})
    assert len(np.unique(predicted)) > 5 and found.correct == found.weight > predicted.size


def test_blanks_are_sentinels_and_filled_where_they_stand(tokenizer: Tokenizer) -> None:
    ids = encode_blanks("def <extra_id_0>(self): return <extra_id_1>", tokenizer)
    first, second = tokenizer.sentinel_ids[:2]
    assert ids[-1] == tokenizer.eos_id and [i for i in ids if i in (first, second)] == [first, second]
    written = [second, *tokenizer.encode("self.x"), first, *tokenizer.encode("name"), second, 5, tokenizer.eos_id]
    answer = np.array(written)
    marked = functools.partial(filled_in, tokenizer=tokenizer, marks=("«", "»"))
    assert marked(ids, answer) == "def «name»(self): return «self.x»"
    assert marked(ids, []) == "def «»(self): return «»"
    assert filled_in(ids, answer, tokenizer) == "def name(self): return self.x"
    with pytest.raises(ValueError, match="the prompt has <extra_id_100>, the tokenizer has 100 sentinels"):
        encode_blanks("<extra_id_100>", tokenizer)
