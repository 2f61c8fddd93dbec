"""Shared by all tests: GPU skipping, one table of tolerances, and small models."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# All of this must be set before jax starts (so `device.nvidia_devices`, which imports it, is of no use here), and reach
# the processes that tests start.
if any(Path("/dev").glob("nvidia[0-9]*")):
    # With -n 4 each process has a fifth of a GPU's memory, whatever one process would have.
    share = 0.8 / int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    given = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "1"))
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{min(given, share):.2f}"
else:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:  # processes that are started from here find it set
        # LLVM's effort and, before jax 0.12, the newer of XLA's two ways to emit a fusion (XLA's passes all run).
        # Compiling is most of the suite's time, and this leaves a quarter of it; with jax 0.12, which has no other way,
        # half. Set the variable to 0 for machine code as users have it; tests/test_notebooks.py does.
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        from tests.flags import accepted_flags

        cheap = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
        os.environ["XLA_FLAGS"] = " ".join([*accepted_flags(cheap), os.environ.get("XLA_FLAGS", "")]).strip()

# A test that limits the size of files would leave broken programs in it.
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

import jax
import pytest

from jaxllm.config import LlamaConfig

gc.set_threshold(20_000, 20, 20)  # jax makes many objects that stay: looking through them so often took 4%

# dtype -> largest difference, relative to the largest value compared.
TOLERANCE = {"float32": 1e-5, "float32_grad": 1e-4, "bfloat16": 3e-2, "float16": 4e-3}


# Every program that XLA:CPU has compiled keeps some mappings of memory, and Linux gives a process 65530 of them.
_MOST_PIECES = 30_000


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Drops compiled programs between two files when room runs short, since XLA would end the process."""
    pieces = Path("/proc/self/maps")
    if nextitem is None or nextitem.path == item.path or not pieces.exists():
        return
    if pieces.read_bytes().count(b"\n") > _MOST_PIECES:
        jax.clear_caches()
        gc.collect()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if jax.default_backend() == "gpu":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU here"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keeps the tests of a file on one worker, which makes shared fixtures once; idle workers take over tests."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@contextlib.contextmanager
def full_disk(size: int = 0) -> Iterator[None]:
    """No file can grow beyond `size` bytes, as on a full disk: a file that was truncated for writing is lost."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A temporary folder that all users can enter; pytest's own is for one."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@contextlib.contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """A file in `open_folder` that this process cannot read: a process of root becomes another user meanwhile."""
    mode, user = path.stat().st_mode, os.geteuid()
    path.chmod(0)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        path.chmod(mode)


@pytest.fixture
def tiny() -> LlamaConfig:
    return LlamaConfig(vocab_size=97, d_model=32, d_ff=48, num_layers=3, num_heads=4, num_kv_heads=2, max_length=64)


def write_corpus(folder: Path) -> None:
    """40 small text documents that repeat a few sentences, so that models learn from them quickly."""
    folder.mkdir()
    for i in range(40):
        lines = [f"line {j}: the cat {i} sat on mat {j % 7} and saw {i * j} birds\n" for j in range(30)]
        (folder / f"{i:02d}.txt").write_text("".join(lines), encoding="utf-8")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of text documents."""
    write_corpus(tmp_path / "corpus")
    return tmp_path / "corpus"
