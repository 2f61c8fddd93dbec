"""What a process finds out about a GPU, and sets before jax opens it; jax's names identify devices."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from jaxllm.host.device import datasheet_peaks, nvidia_devices
from jaxllm.ops import backend
from scripts import gpu_settings
from scripts.gpu_settings import prepare_process
from tests import flags


def test_any_gpu_counts_and_control_files_do_not(tmp_path: Path) -> None:
    for name in ("nvidia3", "nvidia12", "nvidiactl", "nvidia-uvm", "nvidia-caps"):
        (tmp_path / name).touch()
    assert [path.name for path in nvidia_devices(tmp_path)] == ["nvidia12", "nvidia3"]
    assert nvidia_devices(tmp_path / "nothing") == []


def test_a_process_is_prepared_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)
    monkeypatch.setattr(gpu_settings, "nvidia_devices", list)
    prepare_process()
    assert name not in os.environ
    monkeypatch.setattr(gpu_settings, "nvidia_devices", lambda: [Path("/dev/nvidia3")])
    prepare_process()
    assert os.environ[name] == "0.92"
    monkeypatch.setenv(name, "0.5")  # what is set stays
    prepare_process()
    assert os.environ[name] == "0.5"


def test_flags_that_a_process_does_not_survive_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is unknown, and one with which the process hangs."""

    def run(command: list[str], *, env: dict[str, str], timeout: float, **_: Any) -> Any:
        if "hangs" in env["XLA_FLAGS"]:
            raise subprocess.TimeoutExpired(command, timeout)
        return SimpleNamespace(returncode=int("unknown" in env["XLA_FLAGS"]))

    monkeypatch.setattr(flags.subprocess, "run", run)
    assert flags.accepted_flags(["--known", "--unknown", "--hangs"]) == ("--known",)
    assert flags.accepted_flags(["--known", "--also_known"]) == ("--known", "--also_known")


@pytest.mark.parametrize(
    ("platform", "facts", "has"),
    [
        ("gpu", {"compute_capability": "8.0"}, True),
        ("gpu", {"compute_capability": "9.0"}, True),
        ("gpu", {"compute_capability": "7.5"}, False),
        ("gpu", {"compute_capability": "gfx90a"}, False),
        ("cpu", {}, False),
    ],
)
def test_bfloat16_units(platform: str, facts: dict[str, str], has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(**facts)])
    assert backend.has_bfloat16() == has


# device_kind -> dense 16-bit TFLOP/s and memory TB/s of NVIDIA's datasheets.
KINDS = {
    "NVIDIA B200": (2250, 8.0),
    "NVIDIA GH200 480GB": (989, 4.0),
    "NVIDIA H200": (989, 4.8),
    "NVIDIA H200 NVL": (835, 4.8),
    "NVIDIA H100 80GB HBM3": (989, 3.35),
    "NVIDIA H100 PCIe": (756, 2.0),
    "NVIDIA H100 NVL": (835, 3.9),
    "NVIDIA A100-SXM4-80GB": (312, 2.039),
    "NVIDIA A100 80GB PCIe": (312, 1.935),
    "NVIDIA A100-SXM4-40GB": (312, 1.555),
    "NVIDIA A100-PCIE-40GB": (312, 1.555),
    "NVIDIA A10": (125, 0.6),
    "NVIDIA A10G": (70, 0.6),
    "NVIDIA L40S": (362, 0.864),
    "NVIDIA L40": (181, 0.864),
    "NVIDIA L4": (121, 0.3),
    "Tesla V100-SXM2-16GB": (125, 0.9),
    "Tesla V100-PCIE-32GB": (112, 0.9),
    "Tesla V100S-PCIE-32GB": (130, 1.134),
    "Tesla T4": (65, 0.32),
}


@pytest.mark.parametrize("kind", KINDS)
def test_peaks_are_those_of_the_device_itself(kind: str) -> None:
    assert datasheet_peaks(kind) == pytest.approx([1e12 * peak for peak in KINDS[kind]])


@pytest.mark.parametrize(
    "kind", ["cpu", "NVIDIA RTX A1000", "NVIDIA GB200", "Tesla T40", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"]
)
def test_a_device_that_is_not_in_the_table_has_no_peaks(kind: str) -> None:
    assert datasheet_peaks(kind) is None
