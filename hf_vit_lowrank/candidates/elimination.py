"""Removing inputs of a linear map one by one, refitting what is left exactly (optimal brain surgeon).

The map y = W x, x with covariance C, error in a metric Γ on y: removing input j and refitting the others costs
‖Γ^½ W_j‖² / (C⁻¹)_jj and updates W and C⁻¹ by one outer product (Hassibi and Stork 1993, eq. 5). Both updates are kept
pending and applied in blocks by one matrix product, after which the inputs that are gone are left out of both, so the
whole sweep runs at the speed of matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import ridge_solve

_BLOCK = 64


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
    size = weight.shape[1]
    values = root @ weight
    inverse = ridge_solve(covariance, torch.eye(size, dtype=torch.float64), ridge)
    names, gone = torch.arange(size), torch.zeros(size, dtype=torch.bool)
    norms, pivots = values.square().sum(0), inverse.diagonal().clone()
    order, steps = [], []
    rows, directions = inverse.new_zeros(_BLOCK, size), inverse.new_zeros(_BLOCK, values.shape[0])
    pending = 0
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
        # The chosen row of the current inverse and column of the current weight, pending updates included.
        scale = pivots[chosen].sqrt()
        past, past_directions = rows[:pending], directions[:pending]
        row = (inverse[chosen] - past[:, chosen] @ past) / scale
        direction = (values[:, chosen] - past[:, chosen] @ past_directions) / scale
        products = direction @ values - (past_directions @ direction) @ past
        norms = (norms - 2 * row * products + row.square() * direction.square().sum()).clamp_min(0.0)
        pivots = (pivots - row.square()).clamp_min(torch.finfo(torch.float64).tiny)
        rows[pending], directions[pending] = row, direction
        pending += 1
        if pending == _BLOCK:
            left = (~gone).nonzero().squeeze(1)
            rows = rows[:, left]
            inverse = inverse[left][:, left].addmm_(rows.mT, rows, alpha=-1)
            values = values[:, left].addmm_(directions.mT, rows, alpha=-1)
            names, gone, waiting = names[left], torch.zeros(len(left), dtype=torch.bool), waiting[left]
            groups = None if groups is None else groups[left]
            norms, pivots = values.square().sum(0), inverse.diagonal().clamp_min(torch.finfo(torch.float64).tiny)
            pending = 0
    errors = torch.tensor([0.0, *steps], dtype=torch.float64).cumsum(0).flip(0)
    return Elimination(torch.tensor(order), errors)
