"""The direction of imports, what `import jaxllm` may load, and rules that a reader relies on."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jaxllm"
FILES = sorted(PACKAGE.rglob("*.py"))

# A package may import those named, itself and config.
ALLOWED = {
    "ops": set(),
    "models": {"ops"},
    "generation": {"ops", "models"},
    "interop": {"ops", "models", "generation"},
    "data": set(),
    "training": {"ops", "models", "generation", "interop", "data", "sharding"},
    "sharding": {"models"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    own = {name.split(".")[1] for name in imports(path) if name.startswith("jaxllm.")}
    if parts[0] == "config":
        assert not own
    elif parts[0] in ALLOWED:
        assert own <= ALLOWED[parts[0]] | {parts[0], "config", "config_file"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 400 or path.name == "config.py"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{path}:{node.lineno} {node.name}"


def test_import_is_light() -> None:
    code = (
        "import sys, jaxllm; heavy = {'tensorflow', 'tensorflow_datasets', 'grain', 'orbax', 'torch', 'matplotlib', "
        "'pydantic', 'transformers'}; print(sorted(heavy & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_import_time_is_stated_not_guessed() -> None:
    """2.5 s is the promise; twice that is allowed here, because a shared machine stalls."""
    best = float("inf")
    for _ in range(3):
        before = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import jaxllm"], check=True)
        best = min(best, time.perf_counter() - before)
    assert best < 5


def test_no_suppressions() -> None:
    marks = ("# no" + "qa", "# type: " + "ignore", "# pyright: " + "ignore")
    for folder in ("jaxllm", "scripts", "benchmarks", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            assert not [mark for mark in marks if mark in text], path
