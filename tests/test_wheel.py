"""A wheel, installed into an environment of its own, gives the program `jaxllm`, which runs from an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import jaxllm
from tests.conftest import write_corpus

ROOT = Path(__file__).parent.parent
TINY = ["model.d_model=16", "model.d_ff=24", "model.num_layers=1", "model.num_heads=2", "model.num_kv_heads=1"]
TINY += ["model.vocab_size=420", "data.source=files", "data.sequence_length=32", "training.steps=2"]
TINY += ["training.loss_chunk=32", "training.eval_every=2", "training.save_every=2", "training.sample_tokens=2"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged, since a build leaves files in its folder."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("jaxllm", "scripts", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source)
    return next(folder.glob("*.whl"))


def pip(python: str | Path, *arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--python", str(python), *map(str, arguments), "-q", "--no-index"]
    command += ["--disable-pip-version-check"]
    done = subprocess.run(command, env=clean(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def clean() -> dict[str, str]:
    """The environment without this repository on the path."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def environment(folder: Path, wheel: Path) -> Path:
    """The bin/ of an environment that has the packages of this one, but not its jaxllm; nothing is downloaded."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip(folder / "bin" / "python", "install", "--no-deps", wheel)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))  # not read for its own .pth files
    return folder / "bin"


def run(*command: str | Path, folder: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(list(map(str, command)), cwd=folder, env=clean(), capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return done


def loads_jax(program: Path, argument: str, folder: Path) -> bool:
    return (
        "jax" in run(program.with_name("python"), "-X", "importtime", program, argument, folder=folder).stderr.split()
    )


def test_the_wheel_has_every_module_script_and_config(wheel: Path) -> None:
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "jaxllm").rglob("*.py")} | {"jaxllm/py.typed"}
    scripts = ROOT / "scripts"
    wanted |= {f"jaxllm_scripts/{path.relative_to(scripts).as_posix()}" for path in scripts.rglob("*.py")}
    wanted |= {f"jaxllm/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    files = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in files if ".dist-info/" not in name} == wanted
    version = wheel.name.split("-")[1]
    assert version == jaxllm.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version} " in (ROOT / "CHANGELOG.md").read_text()


def test_the_program_runs_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    program = environment(tmp_path / "environment", wheel) / "jaxllm"
    empty = tmp_path / "empty"
    empty.mkdir()
    write_corpus(tmp_path / "texts")
    listed = run(program, "configs", folder=empty).stdout.splitlines()
    assert [line.split()[0] for line in listed] == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    assert run(program, "configs", "t5_tiny", folder=empty).stdout == (ROOT / "configs" / "t5_tiny.yaml").read_text()
    assert not loads_jax(program, "configs", empty) and not loads_jax(program, "--help", empty)
    assert loads_jax(program, "--version", empty)
    assert "did you mean 'pretrain'?" in run(program, "pretrian", folder=empty, status=2).stderr
    assert "did you mean 'llama_tiny'?" in run(program, "pretrain", "lama_tiny", folder=empty, status=2).stderr
    run(program, "pretrain", "llama_tiny", f"data.path={tmp_path / 'texts'}", *TINY, folder=empty)
    assert (empty / "runs" / "llama_tiny" / "config.yaml").is_file()
    python = program.with_name("python")
    assert run(python, "-m", "jaxllm", "generate", "runs/llama_tiny", "line", folder=empty).stdout.strip()


def test_an_editable_installation_has_the_program(source: Path, tmp_path: Path) -> None:
    build = f"import setuptools.build_meta as backend; print(backend.build_editable({str(tmp_path)!r}))"
    name = run(sys.executable, "-c", build, folder=source).stdout.splitlines()[-1]
    program = environment(tmp_path / "environment", tmp_path / name) / "jaxllm"
    assert "llama_tiny" in run(program, "configs", folder=tmp_path).stdout
    assert "family: llama" in run(program, "pretrain", "llama_tiny", "--print-config", folder=tmp_path).stdout
