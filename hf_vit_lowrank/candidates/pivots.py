"""How many rows of a product's left factor can be those of an identity, and which.

A product B A of rank r is also (B T)(T⁻¹ A), for any basis T; one that makes r rows of B T those of an identity (an
interpolative decomposition, Cheng et al. 2005) need not be stored, and nothing else changes. Here the factors of all
heads of all layers have theirs at the same entries of the stream, the first ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Of the smallest rank. With all of it the pivots of DeiT-tiny's layers have condition numbers of 10 to 180, with nine
# tenths 10 to 20, which half precision can take.
TENTHS = 9


def num_pivots(ranks: Sequence[int], hidden_size: int) -> int:
    """Of products that share their pivots, whose left factors have `hidden_size` rows."""
    return 0 if max(ranks) > hidden_size else TENTHS * min(ranks) // 10


def pivots_first(products: Sequence[tuple[Tensor, int]], hidden_size: int) -> list[int]:
    """The entries of the stream in an order in which those of the first number are pivots of each product, chosen one
    by one: the one that adds most to the volume that the pivots of all products span.

    products: the space of each, orthonormal rows (rank, d), and its number of pivots.
    """
    products = [(rows.clone(), pivots) for rows, pivots in products]
    others, order = torch.ones(hidden_size, dtype=torch.bool), []
    for step in range(max((pivots for _, pivots in products), default=0)):
        left = [rows for rows, pivots in products if pivots > step]
        volume = torch.stack([rows.square().sum(0).clamp_min(1e-30).log() for rows in left]).sum(0)
        chosen = int(volume.masked_fill(~others, -torch.inf).argmax())
        order.append(chosen)
        others[chosen] = False
        for rows in left:
            direction = rows[:, chosen] / rows[:, chosen].norm()
            rows -= torch.outer(direction, direction @ rows)
    return order + others.nonzero().flatten().tolist()
