"""docs/extending.md: its code runs from top to bottom, and the lines that it changes are there to be changed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
from tensorflow_datasets.core import registered

from jaxllm.config import DataConfig, OptimizerConfig
from jaxllm.config.model import MODEL_CONFIGS
from jaxllm.config.setting import settings_of
from jaxllm.data.recipes import RECIPES
from jaxllm.models import FAMILIES
from jaxllm.training.names import NAMES
from jaxllm.training.optimizer import OPTIMIZERS, SCHEDULES

_literal: Any = Literal  # of names that are computed, which a type checker refuses
ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
TABLES: tuple[dict[str, Any], ...] = (
    SCHEDULES,
    OPTIMIZERS,
    RECIPES,
    NAMES,
    MODEL_CONFIGS,
    FAMILIES,
    registered._DATASET_REGISTRY,
)


def names_in(line: str) -> tuple[str, ...]:
    """The quoted names in a line."""
    return tuple(re.findall(r'"(\w+)"', line))


def apply_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the diffs of the guide would do to the files."""
    changes = re.findall(r"```diff\n# (\S+)\n-(.+)\n\+(.+)\n```", GUIDE)
    assert len(changes) == GUIDE.count("```diff") == 4
    for file, line, changed in changes:
        assert line in (ROOT / file).read_text(encoding="utf-8").splitlines(), line
        before, after = names_in(line), names_in(changed)
        for config in MODEL_CONFIGS.values():
            if config.objectives == before:
                monkeypatch.setattr(config, "objectives", after)
        for owner in (DataConfig, OptimizerConfig):
            for name, setting in settings_of(owner).items():
                if get_args(setting.kind) == before:
                    widened = setting._replace(kind=_literal[after])
                    monkeypatch.setitem(settings_of(owner), name, widened)


def test_the_guide_to_extending_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    apply_changes(monkeypatch)
    rows = [dict(table) for table in TABLES]
    code = "\n".join(re.findall(r"```python\n(.+?)```", GUIDE, flags=re.S))
    try:
        exec(compile(code, "docs/extending.md", "exec", dont_inherit=True), {"__name__": "guide"})
        assert all(len(table) > len(before) for table, before in zip(TABLES, rows, strict=True))
    finally:
        for table, before in zip(TABLES, rows, strict=True):
            table.clear()
            table.update(before)
