"""A low-rank bypass around an MLP, y += G Y x, that stands in for removed hidden units (design 3.3).

With the units S kept and the down weight refitted on them, what is left of W z is e = W z - B z_S, and what the kept
units do not tell of the MLP's input is x' = x - P z_S. The best GY of rank q in the metric Γ is reduced-rank regression
of e on x': the truncated SVD of Γ^½ Cov(e, x') Cov(x')^-½ (Izenman 1975); the kept units then do B - G Y P.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import square_root

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
    own = units[kept][:, kept]
    own = own + RIDGE * own.diagonal().mean() * torch.eye(len(kept), dtype=torch.float64)
    seen = torch.cat((units[kept] @ weight.mT, cross[kept]), 1)  # Cov(z_S, [W z, x])
    down, predicted = torch.linalg.solve(own, seen).mT.split([len(weight), len(inputs)])
    left = weight @ cross - down @ cross[kept]
    rest = inputs - predicted @ cross[kept]
    rest = rest + RIDGE * inputs.diagonal().mean() * torch.eye(len(inputs), dtype=torch.float64)
    root, inverse = square_root(metric)
    _, whiten = square_root((rest + rest.mT) / 2)
    U, S, Vt = torch.linalg.svd(root @ left @ whiten)
    share = S.sqrt()
    return BypassCandidate(S.square(), down, predicted, inverse @ U * share, share.unsqueeze(1) * Vt @ whiten)
