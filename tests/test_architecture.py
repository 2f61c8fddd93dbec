"""The direction of imports, what `import jaxllm` may load, and rules that a reader relies on."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import jaxllm

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jaxllm"
FILES = sorted(PACKAGE.rglob("*.py"))

# A room imports exactly those named, itself and config.
IMPORTED = {
    "config": set(),
    "ops": set(),
    "jaxprs": {"ops"},
    "data": set(),
    "models": {"ops"},
    "interop": {"models"},
    "generation": {"ops", "models", "jaxprs", "data"},
    "training": {"ops", "models", "data"},
    "host": set(),
    "storage": {"ops", "data", "training", "host"},
    "run": {"ops", "models", "generation", "interop", "data", "training", "jaxprs", "host", "storage", "study"},
    "study": {"training", "jaxprs"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def own_imports(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("jaxllm.")}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(path)
    if room not in ("__init__", "__main__"):
        assert own_imports(path) <= IMPORTED[room] | {room, "config"}


@pytest.mark.parametrize("room", IMPORTED)
def test_the_table_of_imports_allows_nothing_that_is_not_used(room: str) -> None:
    used = set().union(*(own_imports(path) for path in FILES if room_of(path) == room))
    assert used - {room, "config"} == IMPORTED[room]


def test_the_page_on_decisions_names_every_module_that_uses_orbax() -> None:
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    paragraph = page.partition("**Checkpoints** are")[2].partition("\n\n")[0]
    named = set(re.findall(r"`((?:run|storage)/\w+\.py)`", paragraph))
    used = {path.relative_to(PACKAGE).as_posix() for path in FILES if any("orbax" in name for name in imports(path))}
    assert named == used


def test_no_function_hides_a_module_of_its_package() -> None:
    """After `from package.name import name` in a package, `package.name.other` would not be found."""
    for path in (path for path in FILES if path.name == "__init__.py"):
        package = importlib.import_module(".".join(("jaxllm", *path.parent.relative_to(PACKAGE).parts)))
        modules = {info.name for info in pkgutil.iter_modules(package.__path__)}
        assert not {name for name in modules & vars(package).keys() if not inspect.ismodule(vars(package)[name])}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_readable(path: Path) -> None:
    """Docstrings do not count for a function: those of public ones hold errors and an example."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            described = ast.get_docstring(node, clean=False)
            lines = node.end_lineno - node.lineno - len((described or "").splitlines())
            assert lines < 60, f"{path}:{node.lineno} {node.name}"


def test_the_package_stays_small_enough_to_read() -> None:
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES) < 15_000


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda p: p.name)
def test_scripts_stay_thin(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60


def test_import_is_light() -> None:
    code = (
        "import sys, jaxllm; heavy = {'tensorflow', 'tensorflow_datasets', 'grain', 'orbax', 'torch', 'matplotlib', "
        "'transformers'}; print(sorted(heavy & set(sys.modules)), 'optax' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[] True"
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    assert "`import jaxllm` loads jax, flax and optax, but" in page
    assert "loads jax, flax and optax, but" in (jaxllm.__doc__ or "")


def test_every_public_name_exists_and_the_lazy_ones_are_the_real_ones() -> None:
    assert sorted(jaxllm.__all__) == sorted(set(jaxllm.__all__)) and set(jaxllm.__all__) <= set(dir(jaxllm))
    for name in jaxllm.__all__:
        assert getattr(jaxllm, name).__doc__, name
    for name, module in vars(jaxllm)["_LAZY"].items():
        assert getattr(jaxllm, name) is getattr(importlib.import_module(module), name)
    assert set(vars(jaxllm)["_ROOMS"]) == set(IMPORTED)
    for name in IMPORTED:
        assert getattr(jaxllm, name) is importlib.import_module(f"jaxllm.{name}")


def test_import_takes_less_than_twice_the_time_of_what_it_loads() -> None:
    """Processor time, once bytecode is written, in the fastest of four: other work stretches some of them.

    On an idle machine jax, flax and optax take 1.0 s and jaxllm 1.2 s.
    """
    seconds: dict[str, list[float]] = {"import jaxllm": [], "import flax, jax, optax": []}
    for _ in range(5):
        for code, taken in seconds.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", code], check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    own, loaded = (min(taken[1:]) for taken in seconds.values())
    assert own < 2 * loaded, seconds


def axes(path: Path) -> set[str]:
    """Letters of the shapes in annotations such as Float[Array, "B T #S"]."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Subscript)]
    typed = [node for node in nodes if isinstance(node.value, ast.Name) and node.value.id in ("Float", "Int", "Bool")]
    shapes = [node.slice.elts[1].value for node in typed if isinstance(node.slice, ast.Tuple)]
    return {letter for shape in shapes if isinstance(shape, str) for letter in re.findall(r"[A-Za-z]", shape)}


def test_every_axis_of_a_signature_is_in_the_legend_and_no_other() -> None:
    legend = re.findall(r"^ {4}([A-Za-z])  \S", jaxllm.ops.__doc__ or "", flags=re.M)
    assert len(legend) == len(set(legend))
    assert set(legend) == set().union(*(axes(path) for path in FILES))


def test_no_suppressions() -> None:
    marks = ("# no" + "qa", "# type: " + "ignore", "# pyright: " + "ignore")
    for folder in ("jaxllm", "scripts", "benchmarks", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            assert not [mark for mark in marks if mark in text], path
