"""A script whose output pipe is closed ends like other programs: silently, with the status of a closed pipe."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
RUNS = Path(__file__).parent / "golden" / "run_folders"
CLOSED_PIPE = 141


def run_without_a_reader(*command: str, folder: Path) -> tuple[int, str]:
    """Exit status and standard error of a Python command that writes to a pipe without a reader."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SCRIPTS), str(SCRIPTS.parent)])}
    environment.pop("PYTHONUNBUFFERED", None)  # argparse ignores a pipe that breaks while it writes
    try:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=folder,
            env=environment,
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
            check=False,
        )
    finally:
        os.close(writer)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("generate.py", "run", "the", "--max-new-tokens=4"),
        ("inspect_data.py", "run/config.yaml", "training.run_dir=other"),  # rich writes
        ("pretrain.py", "run/config.yaml", "training.run_dir=other"),
        ("list_configs.py", "--help"),  # written after argparse has raised SystemExit
    ],
    ids=lambda words: words[0],
)
def test_it_ends_without_a_word(words: tuple[str, ...], tmp_path: Path) -> None:
    with zipfile.ZipFile(RUNS / "llama_float32.zip") as archive:
        archive.extractall(tmp_path)
    (tmp_path / "text.jsonl").write_bytes((RUNS / "text.jsonl").read_bytes())
    script, *arguments = words
    assert run_without_a_reader(str(SCRIPTS / script), *arguments, folder=tmp_path) == (CLOSED_PIPE, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
@pytest.mark.parametrize(("steps", "status"), [("2", 0), ("10", 75)])
def test_a_log_on_a_full_disk_does_not_change_the_status_of_a_run(steps: str, status: int, tmp_path: Path) -> None:
    with zipfile.ZipFile(RUNS / "llama_float32.zip") as archive:
        archive.extractall(tmp_path)
    (tmp_path / "text.jsonl").write_bytes((RUNS / "text.jsonl").read_bytes())
    settings = [f"training.steps={steps}", "training.run_dir=other", *(["training.stop_after=1s"] if status else [])]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, str(SCRIPTS / "pretrain.py"), "run/config.yaml", *settings],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(SCRIPTS.parent)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (status, "")


def test_another_pipe_that_breaks_is_an_error(tmp_path: Path) -> None:
    """For example, the pipe of a process that reads data."""
    program = """
import sys
from interrupts import failed, interruptible

def lost():
    raise BrokenPipeError("a worker has ended")

@interruptible
def reported():
    try:
        lost()
    except OSError as error:
        return failed(error)

print(reported())
interruptible(lost)()
"""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout, lines[0]) == (1, "2\n", "error: a worker has ended")
    assert lines[-1] == "BrokenPipeError: a worker has ended"


def test_every_script_ends_so() -> None:
    """Errors are reported in one place, since `except OSError` includes a closed pipe."""
    for file in SCRIPTS.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name == "main":
                assert [ast.unparse(each) for each in node.decorator_list] == ["interruptible"], file.name
        assert "{error}" not in text or file.name in ("interrupts.py", "pretrain.py"), file.name
