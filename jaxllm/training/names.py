"""Names of modules and parameters of all families: their forward order, and what training does with a parameter.

Weight decay, the layout over devices and the attribution of overflows read `NAMES`, and `tests/test_names.py` compares
it with every golden parameter tree. A new family adds the names that no other has. A name outside the table, such as
one of your own module, counts as `MODULE` and is last in the order.
"""

from typing import Any, NamedTuple


class Role(NamedTuple):
    """The role of a parameter in training."""

    decayed: bool = False  # whether weight decay shrinks it
    split: bool = False  # whether devices hold shares of it; otherwise each holds a copy


MATRIX = Role(decayed=True, split=True)
SPARED = Role()
MODULE = Role()

# In the order of the forward pass.
NAMES: dict[str, Role] = {
    "embed": MATRIX,
    **dict.fromkeys(("encoder", "decoder"), MODULE),
    "relative_bias": SPARED,
    **dict.fromkeys(("layers", "attn_norm", "attention", "cross_norm", "cross_attention"), MODULE),
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "o_proj"), MODULE),
    **dict.fromkeys(("mlp_norm", "mlp", "gate_proj", "up_proj", "down_proj", "final_norm"), MODULE),
    "lm_head": MATRIX,
    # In the modules above, whose places decide the order.
    "bias": SPARED,
    "kernel": MATRIX,
    "weight": SPARED,
}
_RANKS = {name: rank for rank, name in enumerate(NAMES)}

Path = tuple[Any, ...]  # of `jax.tree_util.tree_leaves_with_path`


def role_of(path: Path) -> Role:
    """The role of the leaf at this path of a parameter tree, or of a tree that ends in one.

    >>> import jax
    >>> params = {"layers": {"q_proj": {"kernel": 0.0}}, "final_norm": {"weight": 0.0}}
    >>> jax.tree_util.tree_map_with_path(lambda path, _: role_of(path).decayed, params)
    {'final_norm': {'weight': False}, 'layers': {'q_proj': {'kernel': True}}}
    """
    return NAMES.get(getattr(path[-1], "key", ""), MODULE) if path else MODULE


def forward_rank(name: str) -> int:
    """The place of a name in the order of the forward pass."""
    return _RANKS.get(name, len(_RANKS))


def is_stacked(path: Path) -> bool:
    """Whether a leaf holds all layers of a stack on its first axis."""
    return any(getattr(part, "key", None) == "layers" for part in path)
