"""Floating-point operations of one training step; each family has its own formula.

The formulas count what the algorithm needs: recomputation and the embedding lookup are not work.
"""

from __future__ import annotations

from typing import NamedTuple


class Flops(NamedTuple):
    """Floating-point operations of one training step.

    Attributes:
        causal: attention counts only the pairs that are seen; publish this one.
        full: attention counts all pairs, as PaLM and most tables do.
        weights: without attention, 6 N per token.
    """

    causal: float
    full: float
    weights: float
