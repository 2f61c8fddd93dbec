"""The loading benchmark at toy size: both sides run, and read the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.load_hf import compare, run_jaxllm, run_transformers, write


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_both_sides_load_the_same(tmp_path: Path, dtype: str) -> None:
    pytest.importorskip("transformers")
    size = write("toy", dtype, tmp_path)["bytes"]
    ours, theirs = run_jaxllm("toy", dtype, tmp_path), run_transformers("toy", dtype, tmp_path)
    compare(tmp_path)
    assert size > 200_000 and 0 < ours["seconds"] and 0 < theirs["seconds"] <= theirs["seconds_own"]
