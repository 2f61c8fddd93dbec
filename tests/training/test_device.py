"""Devices are told apart by the names that jax gives them."""

from __future__ import annotations

import pytest

from jaxllm.training.device import datasheet_peaks

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
