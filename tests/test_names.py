"""Names of parameters and modules that the package repeats by hand are those of the golden trees, and none is left."""

from __future__ import annotations

import jax.numpy as jnp

from jaxllm.training import sharding
from jaxllm.training.attribution import FORWARD_ORDER
from jaxllm.training.optimizer import decay_mask
from tests.golden.trees import leaf_paths

PATHS = leaf_paths()
LEAVES = {path[-1] for path in PATHS}
IN_MODULES = {"kernel", "bias", "weight"}  # of a Linear or a norm, which the name before them ranks


def test_the_order_of_attribution_names_every_module_and_nothing_else() -> None:
    named = {name for path in PATHS for name in path} - IN_MODULES
    assert named == set(FORWARD_ORDER)
    assert len(FORWARD_ORDER) == len(set(FORWARD_ORDER))


def test_sharding_splits_existing_matrices() -> None:
    assert sharding.RULES.keys() <= LEAVES
    assert LEAVES - sharding.RULES.keys() == {"bias", "weight", "relative_bias"}


def test_weight_decay_reaches_existing_matrices() -> None:
    decays = {name: decay_mask({name: jnp.zeros((2, 2))})[name] for name in LEAVES}
    assert {name for name, decayed in decays.items() if decayed} == {"kernel", "embed", "lm_head"}
    assert {name for name, decayed in decays.items() if not decayed} == {"bias", "weight", "relative_bias"}
