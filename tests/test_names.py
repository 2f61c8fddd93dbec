"""The names of modules and parameters that the package declares are exactly those of the parameter trees."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from jaxllm.config import LlamaConfig, T5Config
from jaxllm.config.model import ModelConfig
from jaxllm.jaxprs.hooks import sites
from jaxllm.models import abstract_params, build
from jaxllm.training.attribution import gradient_groups
from jaxllm.training.names import MATRIX, MODULE, NAMES, Role, forward_rank, is_stacked
from jaxllm.training.optimizer import decay_mask
from jaxllm.training.sharding import state_specs
from tests.golden.trees import leaf_paths
from tests.toy_family import Toy, ToyConfig

PATHS = leaf_paths()
LEAVES = {path[-1] for path in PATHS}
IN_MODULES = {"kernel", "bias", "weight"}  # of a Linear or a norm, whose own names have the place in the order


def tree_of(paths: set[tuple[str, ...]]) -> dict:
    """Parameters [4, 6] at these paths, [2, 4, 6] in stacks."""
    tree: dict = {}
    for *modules, leaf in paths:
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = jax.ShapeDtypeStruct((2, 4, 6) if "layers" in modules else (4, 6), jnp.float32)
    return tree


def unknown_names(paths: set[tuple[str, ...]]) -> set[str]:
    return {name for path in paths for name in path} - NAMES.keys()


def test_every_name_of_a_golden_tree_is_declared_and_no_other() -> None:
    assert not unknown_names(PATHS)
    assert NAMES.keys() <= {name for path in PATHS for name in path}


def test_a_name_that_is_missing_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(NAMES, "cross_attention")  # the fault B1 of the review
    assert unknown_names(PATHS) == {"cross_attention"}


def test_a_leaf_is_declared_as_a_parameter_and_a_module_as_a_module() -> None:
    matrices = {name for name, role in NAMES.items() if role == MATRIX}
    assert matrices == LEAVES - {"bias", "weight", "relative_bias"}
    modules = NAMES.keys() - LEAVES
    assert {NAMES[name] for name in modules} == {MODULE}


def test_weight_decay_and_the_layout_follow_the_declaration() -> None:
    tree = tree_of(PATHS)
    for path, decayed in jax.tree_util.tree_leaves_with_path(decay_mask(tree)):
        assert decayed == (path[-1].key in ("kernel", "embed", "lm_head")), path
    for shares, axes in ((2, ("fsdp",)), (3, (None, "fsdp"))):  # the first axis that they divide
        for path, spec in jax.tree_util.tree_leaves_with_path(state_specs(tree, shares)):
            split = PartitionSpec(*[None] * is_stacked(path), *axes)
            assert spec == (split if path[-1].key in ("kernel", "embed", "lm_head") else PartitionSpec()), path
    assert set(jax.tree.leaves(state_specs(tree, 5))) == {PartitionSpec()}


def test_attribution_ranks_every_module_where_the_forward_pass_runs_it() -> None:
    blocks = ["attn_norm", "attention", "cross_norm", "cross_attention", "mlp_norm", "mlp"]
    assert sorted(blocks, key=forward_rank) == blocks
    ends = ["embed", "encoder", "decoder", "layers", "final_norm", "lm_head"]
    assert sorted(ends, key=forward_rank) == ends
    assert max(map(forward_rank, LEAVES)) < forward_rank("a name of nobody's")


def test_a_family_with_names_of_its_own_needs_no_registration() -> None:
    """Its new names come last in the order, are neither decayed nor split, and the shared ones keep their role."""
    params = abstract_params(build_toy())
    assert unknown_names({(name,) for name in params}) == {"mixer", "half_life"}
    assert gradient_groups(params) == ("mixer", "half_life", "embed")
    assert decay_mask(params) == {"embed": True, "mixer": False, "half_life": False}
    assert state_specs(params, 2)["mixer"] == PartitionSpec()
    assert NAMES["embed"] == Role(decayed=True, split=True)


def build_toy() -> Toy:
    return Toy(ToyConfig(vocab_size=32, d_model=8))


SIZES = {"vocab_size": 32, "d_model": 8, "d_ff": 12, "num_layers": 2, "num_heads": 2}


@pytest.mark.parametrize("layers", ["scan", "unroll"])
@pytest.mark.parametrize("config", [LlamaConfig(**SIZES), T5Config(**SIZES, head_dim=4)], ids=lambda c: c.family)
def test_paths_of_hook_points_follow_the_parameter_tree(config: ModelConfig, layers: str) -> None:
    """`jaxllm.jaxprs.hooks` makes them from class names and scopes, which nothing else compares with parameters."""
    model = build(dataclasses.replace(config, layers=layers))
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    inputs = (tokens, tokens) if config.encoder_decoder else (tokens,)
    found = sites(lambda params, *ids: model.apply({"params": params}, *ids))(abstract_params(model), *inputs)
    modules = {tuple(path.split("/")[:-1]) for path in found}
    assert modules and all(any(path[: len(each)] == each for path in PATHS) for each in modules)
