"""How many rows of a product's left factor can be those of an identity.

A product B A of rank r is also (B T)(T⁻¹ A), for any basis T; one that makes r rows of B T those of an identity (an
interpolative decomposition, Cheng et al. 2005) need not be stored, and nothing else changes. Here the factors of all
heads of all layers have theirs at the same entries of the stream, the first ones.
"""

from __future__ import annotations

from collections.abc import Sequence

# Of the smallest rank. With all of it the pivots of DeiT-tiny's layers have condition numbers of 10 to 180, with nine
# tenths 10 to 20, which half precision can take.
TENTHS = 9


def num_pivots(ranks: Sequence[int], hidden_size: int) -> int:
    """Of products that share their pivots, whose left factors have `hidden_size` rows."""
    return 0 if max(ranks) > hidden_size else TENTHS * min(ranks) // 10
