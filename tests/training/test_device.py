"""What a process finds out about a GPU, and sets before jax opens it."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from jaxllm.training import device
from jaxllm.training.device import has_bfloat16, nvidia_devices, prepare_process


def test_any_gpu_counts_and_control_files_do_not(tmp_path: Path) -> None:
    for name in ("nvidia3", "nvidia12", "nvidiactl", "nvidia-uvm", "nvidia-caps"):
        (tmp_path / name).touch()
    assert [path.name for path in nvidia_devices(tmp_path)] == ["nvidia12", "nvidia3"]
    assert nvidia_devices(tmp_path / "nothing") == []


def test_a_process_is_prepared_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(device, "accepted_flags", lambda flags: flags)
    monkeypatch.setattr(device, "nvidia_devices", list)
    prepare_process()
    assert "XLA_FLAGS" not in os.environ
    monkeypatch.setattr(device, "nvidia_devices", lambda: [Path("/dev/nvidia3")])
    monkeypatch.setenv("XLA_FLAGS", "--mine=1")
    prepare_process(["--theirs=2"])
    assert os.environ["XLA_FLAGS"] == "--theirs=2 --mine=1" and os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.92"


@pytest.mark.parametrize(
    ("backend", "facts", "has"),
    [
        ("gpu", {"compute_capability": "8.0"}, True),
        ("gpu", {"compute_capability": "9.0"}, True),
        ("gpu", {"compute_capability": "7.5"}, False),
        ("gpu", {"compute_capability": "gfx90a"}, False),
        ("cpu", {}, False),
    ],
)
def test_bfloat16_units(backend: str, facts: dict[str, str], has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(**facts)])
    assert has_bfloat16() == has
