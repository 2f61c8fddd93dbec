"""Runs on every mesh of eight devices equal runs on one; draws of a device's rows are those of all rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.training.sharding import make_mesh, row_keys

RUNS = {
    "llama scan none": [1, 8, 1],
    "llama unroll full": [2, 4, 1],
    "llama scan elementwise": [4, 2, 1],
    "llama unroll none": [8, 1, 1],
    "t5 scan elementwise": [2, 4, 1],
    "t5 unroll none": [1, 8, 1],
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "tests.training.mesh_runs", str(tmp_path_factory.mktemp("meshes") / "saved")]
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_a_mesh_equals_the_run_on_one_device(report: dict[str, Any], name: str) -> None:
    """Packed rows, relative bias and dropout included; microbatches hold other rows than on one device."""
    found = report[name]
    assert found["mesh"] == RUNS[name]
    assert found["loss"] < 1e-4 and found["gradients"] < 2e-6 and found["parameters"] < 1e-3
    assert found["evaluated"] < 1e-5 and found["predicted"]


def test_the_loss_scale_of_float16_grows_as_on_one_device(report: dict[str, Any]) -> None:
    """It may fall later: a device's gradients are of fewer rows. `test_sharding` has an overflow on one of several."""
    found = report["llama float16"]
    assert found["scales"] and found["skipped"] == 0
    assert found["loss"] < 1e-4 and found["parameters"] < 1e-3


def test_a_mesh_names_the_same_first_value_and_has_the_same_headroom(report: dict[str, Any]) -> None:
    found = report["overflow"]
    assert found["single"] == found["spread"] and "LlamaLayer[1]" in found["single"]
    assert found["blocks"] >= 2 and found["headroom"] < 0.01


def test_a_checkpoint_moves_to_other_meshes_bit_by_bit(report: dict[str, Any]) -> None:
    assert report["moved"]


def test_a_part_of_the_rows_draws_what_all_rows_draw() -> None:
    key, parts, shape = jax.random.key(3), 4, (2, 3, 5)
    keys = jax.random.split(jax.random.fold_in(key, 7), 3)
    every = jax.random.bernoulli(key, 0.7, (8, 3, 5)), jax.random.normal(keys[1], (8, 3, 5))

    @jax.jit
    def draw(own: jax.Array) -> tuple[jax.Array, jax.Array]:
        derived = jax.random.split(jax.random.fold_in(own, 7), 3)[1]
        return jax.random.bernoulli(own, 0.7, shape), jax.random.normal(derived, shape)

    for part in range(parts):
        for found, expected in zip(draw(row_keys(key, jnp.int32(part), parts=parts)), every, strict=True):
            np.testing.assert_array_equal(found, expected[2 * part : 2 * part + 2])
    other = jax.random.key(0, impl="rbg")
    drawn = {float(jax.random.normal(row_keys(other, jnp.int32(part), parts=parts))) for part in range(parts)}
    assert len(drawn) == parts


def test_rows_beyond_32_bits_have_places_of_their_own() -> None:
    part, size = 2**14 + 3, 2**18
    key = row_keys(jax.random.key(3), jnp.int32(part), parts=2**15)
    found = jax.jit(lambda key: jax.random.bits(key, (2, size))[1, 4])(key)
    place = (2 * part + 1) * size + 4
    assert place >= 2**32
    words = jnp.uint32(place >> 32), jnp.uint32(place % 2**32)
    first, second = jax.extend.random.threefry2x32_p.bind(*jax.random.key_data(jax.random.key(3)), *words)
    assert found == first ^ second


def test_a_copy_of_the_state_takes_a_node_unless_the_config_says_otherwise() -> None:
    class Device:
        def __init__(self, process: int, node: int | None = None) -> None:
            self.process_index = process
            if node is not None:
                self.slice_index = node

    def shape(devices: list[Any], fsdp: int | None = None) -> tuple[int, ...]:
        mesh = make_mesh(devices, fsdp=fsdp)
        assert mesh is not None
        return tuple(mesh.shape.values())

    one_each = [Device(i, i // 8) for i in range(16)]
    assert shape([Device(0) for _ in range(8)]) == (1, 8, 1)
    assert shape([Device(i // 4) for i in range(8)]) == (2, 4, 1)  # jax without nodes: processes
    assert shape(one_each) == (2, 8, 1) and shape(one_each, 16) == (1, 16, 1)
    with pytest.raises(ValueError, match=r"sharding\.fsdp 6 does not divide the number of devices, 16; use .* 4"):
        make_mesh(one_each, fsdp=6)
