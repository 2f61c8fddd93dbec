"""Models of the parity cases, made once per session and shared by the golden and the transformers tests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.parity import llama_cases, t5_cases


@pytest.fixture(scope="session")
def llama_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The Hugging Face directory of a Llama case, written without transformers."""

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


@pytest.fixture(scope="session")
def t5_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The same of a T5 case."""

    @functools.cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp("t5") / name
        golden = t5_cases.load_golden(name)
        t5_cases.write_directory(folder, golden["config"], golden["shapes"])
        return folder

    return make


@pytest.fixture(scope="session")
def t5_numbers(t5_directory: Callable[[str], Path]) -> Callable[[str], t5_cases.Numbers]:
    """Our logits, loss and gradients of a T5 case."""
    return functools.cache(lambda name: t5_cases.our_numbers(t5_directory(name)))
