"""A script restarts itself once, in the same process, where huge pages must be requested."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import huge_pages
from jaxllm.host.device import nvidia_devices

SCRIPTS = Path(__file__).parent.parent / "scripts"
# Prints the process id, the arguments, the variable, and whether a large allocation requests huge pages.
PROGRAM = """
import ctypes, os, sys
from huge_pages import restart_with_huge_pages
restart_with_huge_pages()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
address, asked = libc.malloc(ctypes.c_size_t(1 << 26)) + (1 << 25), False
for line in open("/proc/self/smaps"):
    first = line.split()[0]
    if "-" in first and not first.endswith(":"):
        start, end = (int(x, 16) for x in first.split("-"))
        inside = start <= address < end
    elif first == "VmFlags:" and inside:
        asked = "hg" in line.split()
print(os.getpid(), *sys.argv[1:], os.environ.get("GLIBC_TUNABLES"), asked)
"""
on_request = pytest.mark.skipif(
    not huge_pages._on_request() or bool(nvidia_devices()), reason="huge pages are not given on request here"
)


def run(tmp_path: Path, **environment: str) -> tuple[int, list[str]]:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    env = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    env |= {"PYTHONPATH": str(SCRIPTS), **environment}
    command = [sys.executable, str(program), "a b", "--c"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        output, _ = process.communicate()
    assert process.returncode == 0
    return process.pid, output.rstrip("\n").split(" ")


@on_request
def test_the_same_process_runs_the_same_command_with_huge_pages(tmp_path: Path) -> None:
    pid, said = run(tmp_path)
    assert said == [str(pid), "a", "b", "--c", huge_pages.TUNABLES, "True"]


def test_what_the_environment_says_stays(tmp_path: Path) -> None:
    pid, said = run(tmp_path, GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
    assert said == [str(pid), "a", "b", "--c", "glibc.malloc.hugetlb=0", "False"]


class Restarted(Exception):
    """Stands for the end of a process's first life."""


@pytest.mark.parametrize("script", ["pretrain", "generate"])
def test_scripts_that_compute_start_so(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(path: str, command: list[str]) -> None:
        raise Restarted(path, command)

    monkeypatch.setattr(huge_pages, "_on_request", lambda: True)
    monkeypatch.setattr(Path, "exists", lambda self: False)
    monkeypatch.setattr(os, "execv", execute)
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "x.py", "--help"])
    with pytest.raises(Restarted) as stopped:
        runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
    assert stopped.value.args == (sys.executable, [sys.executable, "-u", "x.py", "--help"])
    assert os.environ == {"GLIBC_TUNABLES": huge_pages.TUNABLES}
