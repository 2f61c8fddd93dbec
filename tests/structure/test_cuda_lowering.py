"""Every real-size config lowers for CUDA on a machine without a GPU: abstractly, nothing allocated or compiled."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from jaxllm.config.file import load_config
from tests.structure.programs import pretend_gpu, traced_train_step

CONFIGS = sorted((Path(__file__).parent.parent.parent / "configs").glob("*.yaml"))
REAL = [path for path in CONFIGS if "tiny" not in path.stem]


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_train_step_lowers_with_fused_attention(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch)
    config = load_config(path)
    # A scan over layers lowers one layer; the unrolled program is the same layer again.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, layers="scan"))
    text = traced_train_step(config).lower(lowering_platforms=("cuda",)).as_text()
    stacks = 1 if config.model.family == "llama" else 3
    forward = stacks * (2 if config.model.remat == "full" else 1)
    assert text.count("@__cudnn$fmha") == forward + stacks
    assert text.count("Backward(") == stacks
    assert "tf.aliasing_output" in text or "jax.buffer_donor" in text
