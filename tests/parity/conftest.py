"""Models of the parity cases, made once per session and shared by the golden and the transformers tests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.parity import llama_cases, t5_cases


def _directories(cases: Any, parent: Path) -> Callable[[str], Path]:
    """Writes the Hugging Face directory of a case, without transformers, when it is first asked for."""

    @functools.cache
    def make(name: str) -> Path:
        golden = cases.load_golden(name)
        cases.write_directory(parent / name, golden["config"], golden["shapes"])
        return parent / name

    return make


@pytest.fixture(scope="session")
def llama_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a Llama case."""
    return _directories(llama_cases, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def llama_numbers(llama_directory: Callable[[str], Path]) -> Callable[[str], llama_cases.Numbers]:
    """Our logits, loss and gradients of a case."""
    return functools.cache(lambda name: llama_cases.our_numbers(llama_directory(name)))


@pytest.fixture(scope="session")
def t5_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a T5 case."""
    return _directories(t5_cases, tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="session")
def t5_numbers(t5_directory: Callable[[str], Path]) -> Callable[[str], t5_cases.Numbers]:
    """Our logits, loss and gradients of a T5 case."""
    return functools.cache(lambda name: t5_cases.our_numbers(t5_directory(name)))
