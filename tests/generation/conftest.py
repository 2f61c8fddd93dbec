"""What the tests against transformers share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

import jaxllm


@pytest.fixture(scope="module")
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Any, Any, Any]]:
    """Our model of a parity case, its parameters and transformers' model, built by the test module's `theirs`."""

    @functools.cache
    def make(name: str) -> tuple[Any, Any, Any]:
        built, folder = request.module.theirs.build(name), tmp_path_factory.mktemp("case") / name
        built.save_pretrained(folder)
        return *jaxllm.load_hf(folder), built

    return make
