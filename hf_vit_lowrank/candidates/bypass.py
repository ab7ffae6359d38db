"""A low-rank bypass around an MLP, y += G Y x, that stands in for removed hidden units (design 3.3).

With the units S kept and the down weight refitted on them, what is left of W z is e = W z - B z_S, and what the kept
units do not tell of the MLP's input is x' = x - P z_S. The best GY of rank q in the metric Γ is reduced-rank regression
of e on x' (Izenman 1975): with R = Cov(e, x') Cov(x')⁻¹ of full rank, GY = Γ^-½ U Uᵀ Γ^½ R, U the first q eigenvectors
of Γ^½ R Cov(x', e) Γ^½, whose eigenvalues are the gains; the kept units then do B - G Y P.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import RELATIVE_FLOOR, eigh, ridge_solve, square_root

RIDGE = 1e-5


@dataclass(frozen=True)
class BypassCandidate:
    """One MLP with its kept units. `gains[i]` is what direction i takes from the error, falling, i = 0..d-1.

    down: B (d, k), predicted: P (d, k). The bypass of rank q is `expand[:, :q] @ reduce[:q]`.
    """

    gains: Tensor
    down: Tensor
    predicted: Tensor
    expand: Tensor
    reduce: Tensor

    def weights(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """G (d, rank), Y (rank, d), and the down weight (d, k) that goes with them."""
        expand, reduce = self.expand[:, :rank], self.reduce[:rank]
        return expand, reduce, self.down - expand @ (reduce @ self.predicted)


def bypass_candidate(down_weight: Tensor, kept: Tensor, covariance: Tensor, metric: Tensor) -> BypassCandidate:
    """down_weight W (d, w), kept: the k units S, covariance (w + d, w + d) of all units and the input side by side,
    metric Γ (d, d)."""
    weight, width = down_weight.double(), down_weight.shape[1]
    units, inputs, cross = covariance[:width, :width], covariance[width:, width:], covariance[:width, width:]
    seen = torch.cat((units[kept] @ weight.mT, cross[kept]), 1)  # Cov(z_S, [W z, x])
    down, predicted = ridge_solve(units[kept][:, kept], seen, RIDGE).split([len(weight), len(inputs)])
    left = weight @ cross - down @ cross[kept]
    rest = inputs - predicted @ cross[kept]
    rest = (rest + rest.mT) / 2
    rest.diagonal().add_(RIDGE * inputs.diagonal().mean())
    whole = ridge_solve(rest, left.mT, 0.0)
    root, inverse = square_root(metric)
    explained = root @ whole @ left.mT @ root
    gains, U = (one.flip(-1) for one in eigh((explained + explained.mT) / 2))
    used = gains > RELATIVE_FLOOR * gains[0]
    # Both factors share the singular values evenly.
    share = torch.where(used, gains, 1.0) ** 0.25
    expand, reduce = inverse @ U * (share * used), (U * (used / share)).mT @ root @ whole
    return BypassCandidate(gains * used, down, predicted, expand, reduce)
