"""The direction of imports, what `import jaxllm` may load, and rules that a reader relies on."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jaxllm"
FILES = sorted(PACKAGE.rglob("*.py"))

# A package may import those named, itself and config.
ALLOWED = {
    "ops": set(),
    "study": set(),
    "models": {"ops"},
    "generation": {"ops", "models", "study"},
    "interop": {"ops", "models", "generation"},
    "data": set(),
    "training": {"ops", "models", "generation", "interop", "data", "sharding", "study"},
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
    if parts[0] in ("config", "model_config"):
        assert own == ({"model_config"} if parts[0] == "config" else set())
    elif parts[0] in ALLOWED:
        assert own <= ALLOWED[parts[0]] | {parts[0], "config", "config_file"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 400
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


def test_import_takes_the_seconds_that_are_promised() -> None:
    """2.5 s of processor time, which other work on the machine hardly stretches, after one run that writes bytecode."""
    command = [sys.executable, "-c", "import jaxllm"]
    subprocess.run(command, check=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.5


def test_no_suppressions() -> None:
    marks = ("# no" + "qa", "# type: " + "ignore", "# pyright: " + "ignore")
    for folder in ("jaxllm", "scripts", "benchmarks", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            assert not [mark for mark in marks if mark in text], path
