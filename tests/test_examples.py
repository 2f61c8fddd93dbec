"""Every `>>>` example in a docstring of the package runs and prints what it shows."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import jaxllm


def examples() -> list[doctest.DocTest]:
    names = ["jaxllm", *(module.name for module in pkgutil.walk_packages(jaxllm.__path__, "jaxllm."))]
    found = [each for name in names for each in doctest.DocTestFinder().find(importlib.import_module(name))]
    return sorted((each for each in found if each.examples), key=lambda each: each.name)


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name)
def test_an_example_runs(example: doctest.DocTest) -> None:
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    runner.run(example, out=report.append)
    assert not runner.failures, "".join(report)
