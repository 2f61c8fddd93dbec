"""The gate's own choices: which versions its lanes install, and which Python it takes."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GATE = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_oldest_lane_has_one_version_of_every_dependency() -> None:
    bounds = runpy.run_path(str(ROOT / ".ci" / "lower_bounds.py"))["lower_bounds"]()
    assert len(bounds) == len(PROJECT["dependencies"])
    assert all(re.fullmatch(r"[\w-]+==\d+(\.\d+)+|[\w-]+==\d+", each) for each in bounds), bounds
    assert [each.split("==")[0] for each in bounds] == [re.split(r"[>=]", each)[0] for each in PROJECT["dependencies"]]


def lists_of_tests() -> tuple[str, str]:
    """Those of both shorter lanes, and those of the newest alone."""
    short, more = (" ".join(each.split()) for each in re.findall(r"^\w*jax_tests=\((.+?)\)", GATE, flags=re.S | re.M))
    return short, more


def test_the_tests_of_the_short_lanes_exist() -> None:
    for each in " ".join(lists_of_tests()).split():
        path, _, name = each.partition("::")
        files = [ROOT / path] if path.endswith(".py") else [*(ROOT / path).glob("test_*.py")]
        assert files and all(f"def {name or 'test_'}" in file.read_text(encoding="utf-8") for file in files)


def test_the_supported_versions_of_python_start_at_the_required_one() -> None:
    versions = re.findall(r"Python :: (3\.\d+)$", "\n".join(PROJECT["classifiers"]), flags=re.M)
    assert PROJECT["requires-python"] == f">={versions[0]}"
    assert [int(each.split(".")[1]) for each in versions] == list(range(11, 11 + len(versions)))


def test_what_needs_torch_or_transformers_is_marked() -> None:
    """The gate runs marked tests on a Python with torch, and the others on a Python that may not have it."""
    needed = re.compile(r"importorskip\(\"(torch|transformers|tests\.parity\.torch|benchmarks\.gpu\.torch)")
    for file in (ROOT / "tests").rglob("test_*.py"):
        before, *functions = re.split(r"\n\n\n(?=@|def |class )", file.read_text(encoding="utf-8"))
        of_file = "pytestmark" in before and "pytest.mark.parity" in before
        for part in functions if of_file else [before, *functions]:
            assert of_file or not needed.search(part) or "pytest.mark.parity" in part, (file.name, part[:200])


FUNCTION = re.compile(r"^\w+\(\) \{.*?^\}$", flags=re.S | re.M)


def functions_of_the_gate() -> str:
    return "\n".join(FUNCTION.findall(GATE))


def bash(program: str, path: Path, pyenv: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{path}{os.pathsep}/usr/bin{os.pathsep}/bin", "PYENV_ROOT": str(pyenv)}
    command = ["/bin/bash", "-c", f"set -euo pipefail\n{functions_of_the_gate()}\n{program}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def fake_python(file: Path, version: str) -> None:
    """A Python that prints a version for any program, or that fails where it is empty."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{f'echo {version}' if version else 'exit 127'}\n")
    file.chmod(0o755)


def test_a_python_is_found_on_the_path_or_of_pyenv_and_a_shim_without_one_is_passed_over(tmp_path: Path) -> None:
    fake_python(tmp_path / "path" / "python3.97", "3.97")
    fake_python(tmp_path / "path" / "python3.98", "")  # pyenv's shim of a version that is not chosen
    fake_python(tmp_path / "pyenv" / "versions" / "3.98.4" / "bin" / "python3", "3.98")
    program = 'for version in 3.97 3.98 3.99; do echo "[$(find_python $version)]"; done'
    found = bash(program, tmp_path / "path", tmp_path / "pyenv").stdout.splitlines()
    assert found == [f"[{tmp_path}/path/python3.97]", f"[{tmp_path}/pyenv/versions/3.98.4/bin/python3]", "[]"]


@pytest.mark.parametrize(("command", "status"), [("true", 0), ("false", 1)])
def test_a_lane_prints_its_minutes_and_fails_with_its_command(command: str, status: int, tmp_path: Path) -> None:
    done = bash(f"lane work {command}\necho after", tmp_path, tmp_path)
    assert done.returncode == status and ("after" in done.stdout) == (status == 0)
    optional = bash(f"lane work {command} || echo missing", tmp_path, tmp_path)
    assert optional.returncode == 0 and ("missing" in optional.stdout) == bool(status)
    assert ("work: 0:00 minutes" in optional.stdout) == (status == 0)


def test_the_version_of_a_python_that_makes_no_environment_is_empty(tmp_path: Path) -> None:
    assert bash(f"version_of {sys.executable}", tmp_path, tmp_path).stdout == "{}.{}\n".format(*sys.version_info[:2])
    assert bash("version_of /bin/false", tmp_path, tmp_path).stdout == ""


def test_the_newest_python_that_is_found_is_taken_else_the_one_given(tmp_path: Path) -> None:
    fake_python(tmp_path / "pyenv" / "versions" / "3.98.4" / "bin" / "python3", "3.98")
    program = "newest_of given 3.97 3.98 3.99; newest_of given 3.97; newest_of given"
    found = bash(program, tmp_path / "path", tmp_path / "pyenv").stdout.splitlines()
    assert found == [f"{tmp_path}/pyenv/versions/3.98.4/bin/python3", "given", "given"]


def lanes_with(newest: str, oldest: str, folder: Path) -> list[str]:
    """The lanes that the gate would run where `python3` is 3.11; nothing is run."""
    pretended = f"""
lane() {{ echo "$1: ${{@:2}}"; }}
enter() {{ echo "in $2"; }}
versions() {{ :; }}
python() {{ :; }}
version_of() {{ case $1 in */python3) echo 3.11 ;; *) echo "$1" ;; esac; }}
find_python() {{ case $1 in 3.11) echo '{oldest}' ;; 3.13) echo '{newest}' ;; esac; }}
"""
    body = FUNCTION.sub("", GATE.replace('cd "$(dirname "$0")/.."', f"cd '{ROOT}'"))
    done = bash(f"{pretended}\n{body}", folder, folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_all_tests_run_on_python3_and_lists_of_them_on_the_newest_and_oldest(tmp_path: Path) -> None:
    fake_python(tmp_path / "python3", "3.11")
    lines = lanes_with("3.13", "3.11", tmp_path)
    install, tests = (part.strip() for part in re.findall(r"\n(pip install .+) && (.+)\n", README)[-1])
    short, more = lists_of_tests()
    order = [f"in {tmp_path}/python3", f"install: eval {install}", f"all tests: eval {tests}"]
    order += ["in 3.13", f"newest jax: python -m pytest -q -o addopts= -n auto {short} {more}"]
    order += ["in 3.11", f"oldest jax: python -m pytest -q -o addopts= -W default -n auto {short}"]
    assert [line for line in lines if line in order] == order and lines[-1] == order[-1]


def test_with_one_python_the_gate_names_what_it_has_not_run(tmp_path: Path) -> None:
    fake_python(tmp_path / "python3", "3.11")
    lines = lanes_with("", "", tmp_path)
    assert [line for line in lines if line.startswith("in ")] == [f"in {tmp_path}/python3"]
    assert [line for line in lines if line.startswith("all tests: ")]
    assert [line.split(":")[:2] for line in lines[-2:]] == [["not run", " newest jax"], ["not run", " oldest jax"]]
