"""Fewer hidden units that read an MLP's input: some rows of the up weight W (w, d), all others being made of those.

A weight of rank r is r of its rows, r d entries, and a map from those to the others, r (w - r) entries: an
interpolative decomposition (Cheng et al. 2005), with r² entries less than two factors of that rank. The best weight of
a rank minimises tr(M (W - W') C (W - W')ᵀ), C being the covariance of the inputs and M what an error before the
activation costs: (W₂ᵀ Γ W₂) ∘ E[a aᵀ], W₂ the down weight, Γ the output metric and a the slopes of the units'
activation. By Eckart and Young it is W C^½ V Vᵀ C^-½, V the first r eigenvectors of C^½ N C^½, N = Wᵀ M W, and the
other eigenvalues are the error.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..linalg import eigh, square_root
from ..statistics import Moments
from .pivots import pivots_first

# With fewer rows, or fewer others, 8 bits by torchao fail.
_FEWEST = 2


def input_metric(up_weight: Tensor, down_weight: Tensor, metric: Tensor, slopes: Moments) -> Tensor:
    """N (d, d) of an up weight (w, d), a down weight (d, w) and an output metric Γ (d, d).

    slopes: moments of each unit's slope (w, 1). Those of different units are taken for independent, so that all units
    together do what their mean slopes do, and each adds what its own varies by.
    """
    up_weight, down_weight = (weight.detach().cpu().double() for weight in (up_weight, down_weight))
    mean, square = slopes.first.squeeze(-1) / slopes.count, slopes.second.flatten() / slopes.count
    through = (down_weight * mean) @ up_weight
    own = (square - mean.square()).clamp_min(0.0) * (down_weight * (metric @ down_weight)).sum(0)
    return through.mT @ metric @ through + (up_weight.mT * own) @ up_weight


def rank_errors(covariance: Tensor, metric: Tensor) -> Tensor:
    """(d + 1,): the least error of each rank 0, 1, …; C and N (d, d)."""
    values, _, _ = _directions(covariance, metric)
    return torch.cat((values.flip(0).cumsum(0).flip(0), values.new_zeros(1)))


def best_ranks(errors: np.ndarray, slopes: np.ndarray, entry_cost: int, hidden_size: int, multiple: int) -> np.ndarray:
    """For each width 0, 1, … the rank that goes with it, a multiple of `multiple`; 0 where the weight stays whole.

    errors: of each rank, much the same for all widths, since the units kept do what all did. slopes: what the error
    falls by when the width costs one more. A plan in which that is the same for all pieces is the best, so that the
    rank, too, is the one at which one less would cost more than it saves.
    """
    widths = np.arange(len(slopes))
    best, least = np.zeros(len(slopes), dtype=int), slopes * entry_cost * widths * hidden_size
    for rank in range(-(-_FEWEST // multiple) * multiple, len(errors), multiple):
        cost = errors[rank] + slopes * entry_cost * rank * (widths + hidden_size - rank)
        better = (cost < least) & (widths >= rank + _FEWEST)
        best[better], least[better] = rank, cost[better]
    return best


def low_rank(weight: Tensor, covariance: Tensor, metric: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best weight of a rank, C and N (d, d) given, as an order of its rows (w,), the first `rank` of them in it,
    (rank, d), and the map (w - rank, rank) that makes the others of those."""
    _, outward, inward = _directions(covariance, metric)
    space, coordinates = torch.linalg.qr(weight.double() @ outward[:, :rank])
    order = torch.tensor(pivots_first([(space.mT, rank)], len(space)))
    pivots, others = space[order].split([rank, len(space) - rank])
    return order, pivots @ coordinates @ inward[:rank], torch.linalg.solve(pivots, others, left=False)


def _directions(covariance: Tensor, metric: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues of C^½ N C^½, falling; C^½ V (d, d), and Vᵀ C^-½ (d, d)."""
    root, inverse = square_root(covariance)
    product = root @ metric @ root
    values, vectors = (one.flip(-1) for one in eigh((product + product.mT) / 2))
    return values.clamp_min(0.0), root @ vectors, vectors.mT @ inverse
