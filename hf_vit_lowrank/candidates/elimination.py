"""Removing inputs of a linear map one by one, refitting what is left exactly (optimal brain surgeon).

The map y = W x, x with covariance C, error in a metric Γ on y: removing input j and refitting the others costs
‖Γ^½ W_j‖² / (C⁻¹)_jj and updates W and C⁻¹ by one outer product (Hassibi and Stork 1993, eq. 5). Of W no more than WᵀΓW
is needed. The updates of both matrices are kept pending and applied in blocks by matrix products, at whose speed the
whole sweep runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import ridge_inverse

_BLOCK = 64
# Matrices are copied without the inputs that are gone when these are so large a share of them.
_GONE = 1 / 8


@dataclass(frozen=True)
class Elimination:
    """`order[t]` is the input removed at step t; `errors[k]` is the error with k inputs left, k = 0..n."""

    order: Tensor
    errors: Tensor

    def kept(self, count: int) -> Tensor:
        """The inputs left when `count` are left, ascending."""
        return self.order[len(self.order) - count :].sort().values


def eliminate(
    weight: Tensor, covariance: Tensor, root: Tensor, ridge: float, groups: Tensor | None = None
) -> Elimination:
    """weight (m, n), covariance (n, n) of the inputs, root (m, m) = Γ^½ of the output metric, all float64.

    ridge: share of the mean diagonal added to the covariance, which keeps the inverse finite for dead or dependent
        inputs.
    groups: (n,) group 0, 1, … of each input, all of one size; in every round each group loses one input, so that the
        groups stay equal. Without them any input may go at any time.
    """
    size, tiny = weight.shape[1], torch.finfo(torch.float64).tiny
    values = root @ weight
    gram, inverse = values.mT @ values, ridge_inverse(covariance, ridge)
    names, gone = torch.arange(size), torch.zeros(size, dtype=torch.bool)
    norms, pivots = gram.diagonal().clone(), inverse.diagonal().clone()
    order, steps = [], []
    # Pending: inverse -= rowsᵀ rows, gram -= rowsᵀ sides + sidesᵀ rows.
    rows, sides, pending = inverse.new_zeros(_BLOCK, size), inverse.new_zeros(_BLOCK, size), 0
    waiting = ~gone  # the inputs of groups that have lost none in this round
    for _ in range(size):
        cost = (norms / pivots).masked_fill_(gone | ~waiting, torch.inf)
        chosen = int(cost.argmin())
        if groups is not None:
            waiting &= groups != groups[chosen]
            waiting |= ~waiting.any()
        order.append(int(names[chosen]))
        steps.append(float(cost[chosen]))
        gone[chosen] = True
        # Rows of the current matrices, pending updates included.
        scale, past, past_sides = pivots[chosen].sqrt(), rows[:pending], sides[:pending]
        row = (inverse[chosen] - past[:, chosen] @ past) / scale
        products = (gram[chosen] - past[:, chosen] @ past_sides - past_sides[:, chosen] @ past) / scale
        side = products - 0.5 * cost[chosen] * row
        norms = (norms - 2 * row * side).clamp_min(0.0)
        pivots = (pivots - row.square()).clamp_min(tiny)
        rows[pending], sides[pending] = row, side
        pending += 1
        if pending == _BLOCK:
            inverse.addmm_(rows.mT, rows, alpha=-1)
            gram.addmm_(rows.mT, sides, alpha=-1).addmm_(sides.mT, rows, alpha=-1)
            pending = 0
            if gone.sum() >= _GONE * len(gone):
                left = (~gone).nonzero().squeeze(1)
                inverse, gram = (matrix[left.unsqueeze(1), left] for matrix in (inverse, gram))
                rows, sides = rows[:, left], sides[:, left]
                names, gone, waiting = names[left], torch.zeros(len(left), dtype=torch.bool), waiting[left]
                groups = None if groups is None else groups[left]
            norms, pivots = gram.diagonal().clamp_min(0.0), inverse.diagonal().clamp_min(tiny)
    errors = torch.tensor([0.0, *steps], dtype=torch.float64).cumsum(0).flip(0)
    return Elimination(torch.tensor(order), errors)
