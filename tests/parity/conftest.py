"""Models of the parity cases, made once per session and shared by the golden and the transformers tests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.parity import llama_cases


@pytest.fixture(scope="session")
def llama_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The Hugging Face directory of a case, written without transformers."""

    @functools.cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("llama") / name
        golden = llama_cases.load_golden(name)
        llama_cases.write_directory(folder, golden["config"], golden["shapes"])
        return folder

    return make


@pytest.fixture(scope="session")
def llama_numbers(llama_directory: Callable[[str], Path]) -> Callable[[str], llama_cases.Numbers]:
    """Our logits, loss and gradients of a case."""
    return functools.cache(lambda name: llama_cases.our_numbers(llama_directory(name)))
