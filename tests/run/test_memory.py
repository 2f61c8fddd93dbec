"""Memory that is not there is reported in a sentence: limits, control groups, CPUs, and what ends while training."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxllm.config import LlamaConfig, OptimizerConfig, RunConfig
from jaxllm.host import device
from jaxllm.host.device import Device, host_memory
from jaxllm.run import steps
from jaxllm.run.compiled import DeviceError, explained
from jaxllm.run.steps import announce_fit
from jaxllm.training.fit import FitError, check_fit
from jaxllm.training.program import Program, program_of

CPU = Device("cpu", 1, None, None, None)
MODEL = LlamaConfig(vocab_size=64, d_model=16, d_ff=32, num_layers=1, num_heads=2)


@pytest.fixture(scope="module")
def program() -> Program:
    return program_of(RunConfig(model=MODEL, optimizer=OptimizerConfig(learning_rate=0.1)))


@pytest.mark.parametrize("gigabytes", [1.5, 2.3])
def test_a_start_under_a_limit_of_addresses_ends_and_has_the_reason(gigabytes: float) -> None:
    """The threads of a library would wait for one that cannot start."""
    script = Path(__file__).parent.parent.parent / "scripts" / "pretrain.py"
    limited = ["sh", "-c", 'ulimit -v "$0"; exec "$@"', str(int(gigabytes * 1e9) // 1024)]
    command = [*limited, sys.executable, str(script), "configs/llama_tiny.yaml"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd=script.parent.parent,
    )
    assert done.returncode == 2 and f"limited to {gigabytes} GB" in done.stderr and "ulimit -v" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_memory_of_a_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_GROUPS", tmp_path)
    machine = host_memory()
    assert machine >= os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory() == machine
    swap = machine - os.sysconf("SC_PHYS_PAGES") * resource.getpagesize()
    (tmp_path / "memory.max").write_text(f"{1 << 28}\n")
    assert host_memory() == (1 << 28) + swap
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(f"{1 << 27}\n")
    assert host_memory() == (1 << 27) + swap


def test_a_cpu_is_asked_for_no_more_than_its_machine_has(
    program: Program, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    state = sum(leaf.size * 4 for leaf in jax.tree.leaves(program.abstract_state().params)) * 3
    monkeypatch.setattr(steps, "host_memory", lambda: state - 4)
    with pytest.raises(FitError, match=r"needs at least .*; moments: set|moments: set .*; parameters: choose"):
        announce_fit(program, CPU)  # nothing is compiled
    monkeypatch.setattr(steps, "host_memory", lambda: 2 * state)
    with caplog.at_level("WARNING", logger="jaxllm"):
        announce_fit(program, CPU)
    assert "may be too large, so the compiler's own figure will decide; activations: raise training." in caplog.text
    monkeypatch.setattr(steps, "host_memory", lambda: 1 << 35)
    caplog.clear()
    fit, limit = announce_fit(program, CPU)
    check_fit(fit, 1 << 35, limit=limit)
    with pytest.raises(FitError, match=r"needs at least 68.7 GB and the device has 34.4 GB.*activations: raise"):
        check_fit(fit, 1 << 36, limit=limit)
    assert not caplog.records


@pytest.mark.parametrize(
    "error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")]
)
def test_memory_that_ends_is_a_sentence(error: Exception) -> None:
    with pytest.raises(DeviceError, match=r"^the step .*; raise training.accumulation"), explained("run"):
        with explained("step"):
            raise error
