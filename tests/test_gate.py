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
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_oldest_lane_has_one_version_of_every_dependency() -> None:
    bounds = runpy.run_path(str(ROOT / ".ci" / "lower_bounds.py"))["lower_bounds"]()
    assert len(bounds) == len(PROJECT["dependencies"])
    assert all(re.fullmatch(r"[\w-]+==\d+(\.\d+)+|[\w-]+==\d+", each) for each in bounds), bounds
    assert [each.split("==")[0] for each in bounds] == [re.split(r"[>=]", each)[0] for each in PROJECT["dependencies"]]


def test_the_tests_of_the_short_lanes_exist() -> None:
    lists = re.findall(r"^\w*jax_tests=\((.+?)\)", GATE, flags=re.S | re.M)
    assert len(lists) == 2
    for each in " ".join(lists).split():
        path, _, name = each.partition("::")
        files = [ROOT / path] if path.endswith(".py") else [*(ROOT / path).glob("test_*.py")]
        assert files and all(f"def {name or 'test_'}" in file.read_text(encoding="utf-8") for file in files)


def test_the_supported_versions_of_python_start_at_the_required_one() -> None:
    versions = re.findall(r"Python :: (3\.\d+)$", "\n".join(PROJECT["classifiers"]), flags=re.M)
    assert PROJECT["requires-python"] == f">={versions[0]}"
    assert [int(each.split(".")[1]) for each in versions] == list(range(11, 11 + len(versions)))


def functions_of_the_gate() -> str:
    return "\n".join(re.findall(r"^\w+\(\) \{.*?^\}$", GATE, flags=re.S | re.M))


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
