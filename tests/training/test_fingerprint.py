"""Fingerprints change with every bit and every position, and with nothing else."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.training.fingerprint import fingerprints, named_fingerprints, total

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint32", "int8", "bool")


def values(dtype: str, shape: tuple[int, ...] = (6, 5)) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, 100, shape) % (2 if dtype == "bool" else 100), dtype)


@pytest.mark.parametrize("dtype", [each for each in DTYPES if each != "bool"])
def test_every_flipped_bit_changes_both_sums(dtype: str) -> None:
    array = np.asarray(values(dtype))
    before = np.asarray(fingerprints([array]))
    unsigned = f"uint{8 * array.dtype.itemsize}"
    for element in range(array.size):
        for bit in range(8 * array.dtype.itemsize):
            bits = array.copy().view(unsigned)
            bits.ravel()[element] ^= np.asarray(1 << bit, unsigned)
            assert (np.asarray(fingerprints([bits.view(array.dtype)])) != before).all(), (element, bit)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swapped_elements_are_seen(dtype: str) -> None:
    """A plain sum would not change."""
    array = np.asarray(values(dtype)).copy()
    before = np.asarray(fingerprints([array]))
    flat = array.reshape(-1)
    other = int(np.flatnonzero(flat != flat[0])[0])
    flat[[0, other]] = flat[[other, 0]]
    assert array.sum() == np.asarray(values(dtype)).sum()
    assert (np.asarray(fingerprints([array])) != before).any()


@pytest.mark.parametrize("bit", [31, 30])
def test_the_same_bit_of_two_elements_does_not_cancel(bit: int) -> None:
    """Of a sum of words times odd numbers, two flipped signs would."""
    array = np.asarray(values("float32"))
    before = np.asarray(fingerprints([array]))
    for other in range(1, array.size):
        bits = array.copy().view(np.uint32)
        bits.ravel()[[0, other]] ^= np.uint32(1 << bit)
        assert (np.asarray(fingerprints([bits.view(np.float32)])) != before).all(), other


def test_minus_zero_another_nan_and_another_dtype_are_other_bits() -> None:
    pairs = (jnp.array([0.0]), jnp.array([-0.0])), (jnp.array([1.0], "float16"), jnp.array([1.0], "bfloat16"))
    for a, b in pairs:
        assert named_fingerprints([a]) != named_fingerprints([b])
    nan = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    assert named_fingerprints([nan[:1]]) != named_fingerprints([nan[1:]])


def test_names_follow_the_tree_and_the_total_ignores_their_order() -> None:
    tree = {"params": {"embed": values("float32"), "key": jax.random.key(1)}, "step": (jnp.int32(3),)}
    named = named_fingerprints(tree)
    assert set(named) == {"params/embed", "params/key", "step/0"} and all(
        len(digits) == 16 for digits in named.values()
    )
    assert total(named) == total(dict(reversed(named.items()))) != total({**named, "step/0": "0" * 16})


def test_it_is_the_same_on_any_number_of_devices() -> None:
    code = """
import jax, numpy as np, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxllm.training.fingerprint import named_fingerprints
x = np.random.default_rng(0).standard_normal((8, 12)).astype(np.float32)
mesh = jax.make_mesh((jax.device_count(),), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
layouts = {"rows": P("d"), "copies": P()}
tree = {name: jax.device_put(x, NamedSharding(mesh, layout)) for name, layout in layouts.items()}
print(named_fingerprints(tree))
"""
    flags = os.environ.get("XLA_FLAGS", "")
    found = set()
    for count in (1, 2, 4):
        environment = {**os.environ, "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={count}"}
        command = [sys.executable, "-c", code]
        found.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(found) == 1
