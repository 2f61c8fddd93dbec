"""Keys that a config.json leaves out get transformers' defaults, for every architecture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxllm.interop import llama, t5
from jaxllm.interop.hf import load_hf_config, special_ids

transformers = pytest.importorskip("transformers")

# transformers warns about itself.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize("kind", [*llama.DEFAULTS, *t5.DEFAULTS])
def test_a_bare_config_means_what_transformers_fills_in(kind: str, tmp_path: Path) -> None:
    whole = transformers.AutoConfig.for_model(kind).to_dict()
    if kind == "umt5":  # transformers 5 fills in scaled logits, but the model was not made with them
        del whole["scale_decoder_outputs"], whole["tie_word_embeddings"]
    found = []
    for name, raw in (("bare", {}), ("whole", whole)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**raw, "model_type": kind}))
        save_file({"shared.weight": np.zeros((1, 1), np.float32)}, folder / "model.safetensors")
        found.append((load_hf_config(folder), special_ids(folder)))
    assert found[0] == found[1]
