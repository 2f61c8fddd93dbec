"""Floating-point operations of one training step; each family has its own formula.

The formulas count the algorithm's work, without recomputation and the embedding lookup.
"""

from typing import NamedTuple


class Flops(NamedTuple):
    """Floating-point operations of one training step."""

    causal: float  # attention counts only visible pairs; publish this one
    full: float  # attention counts all pairs, as in PaLM and most tables
    weights: float  # without attention, 6 N per token
