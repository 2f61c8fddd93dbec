"""Rows without a document mask: one text per row, and a loss that no mask reaches."""

from __future__ import annotations

import numpy as np
import pytest

from jaxllm.config import DataConfig
from jaxllm.data.recipes import causal_recipe


def expanded(*, document_mask: bool) -> dict[str, np.ndarray]:
    config = DataConfig(sequence_length=4, document_mask=document_mask)
    packed = {
        "tokens": np.array([5, 6, 7, 8, 9, 5, 6, 0], np.int32),
        "targets": np.array([6, 7, 5, 9, 5, 6, 5, 0], np.int32),
        "tokens_segment_ids": np.array([1, 1, 1, 2, 2, 3, 3, 0], np.int32),
        "tokens_positions": np.array([0, 1, 2, 0, 1, 0, 1, 0], np.int32),
    }
    recipe = causal_recipe(config, tokenizer=None, start_id=0)
    return recipe.expand(packed, np.random.default_rng(0))


def test_without_a_mask_a_row_is_one_text() -> None:
    masked, whole = expanded(document_mask=True), expanded(document_mask=False)
    assert set(masked) - set(whole) == {"segment_ids"}
    assert whole["positions"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert masked["positions"].tolist() == [[0, 1, 2, 0], [0, 0, 1, 0]]
    for name in ("tokens", "targets", "weights"):
        np.testing.assert_array_equal(whole[name], masked[name])


def test_examples_of_other_objectives_must_not_mix() -> None:
    with pytest.raises(ValueError, match="document_mask: false needs objective causal"):
        DataConfig(objective="span_corruption", document_mask=False)
