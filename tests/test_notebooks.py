"""Every notebook of docs/notebooks runs from top to bottom, in an empty folder; its own asserts are the test."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
EXECUTE = ROOT / "docs" / "notebooks" / "execute.py"
NOTEBOOKS = sorted(EXECUTE.parent.glob("*.ipynb"))
PAGES = "".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def test_each_task_has_its_notebook_and_the_page_names_all() -> None:
    names = {"own_text", "span_corruption", "inside", "loss_scale", "sweep"}
    assert {path.stem for path in NOTEBOOKS} == names
    assert {name for name in names if f"notebooks/{name}.ipynb" in PAGES} == names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_in_an_empty_folder_and_leaves_nothing_there(path: Path, tmp_path: Path) -> None:
    # Compiled as users compile them (see tests/conftest.py): most of their time is training.
    optimized = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
    settings = {**os.environ, **optimized, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "temporary")}
    (tmp_path / "temporary").mkdir()
    (tmp_path / "empty").mkdir()
    command = [sys.executable, str(EXECUTE), str(path)]
    done = subprocess.run(command, cwd=tmp_path / "empty", env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "empty").iterdir())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_asserts_explains_and_shows_stored_pictures(path: Path) -> None:
    code = ["".join(cell["source"]) for cell in cells(path, "code")]
    text = "".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    assert sum(isinstance(node, ast.Assert) for source in code for node in ast.walk(ast.parse(source))) >= 2
    assert len(text) > 1500
    outputs = [output for cell in cells(path, "code") for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", ()) for output in outputs) >= 2
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert path.stat().st_size < 250_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_imports_what_a_page_names(path: Path) -> None:
    found = set()
    for cell in cells(path, "code"):
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxllm"):
                found.add(node.module)
    assert not {module for module in found if module not in PAGES}


def test_a_failing_assert_fails_the_execution(tmp_path: Path) -> None:
    source = {"cells": [{"cell_type": "code", "source": ["x = 1\n", "assert x == 2"]}]}
    (tmp_path / "wrong.ipynb").write_text(json.dumps(source))
    command = [sys.executable, str(EXECUTE), str(tmp_path / "wrong.ipynb")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "AssertionError" in done.stderr and "code cell 0" in done.stderr
