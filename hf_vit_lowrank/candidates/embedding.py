"""Fewer parameters for the two pieces of the embeddings, each as a product of two.

Patches are alike and filters smooth, so that the projection z = W x of a patch needs few directions: B A W, BA the best
rank-r product for E‖Γ^½ (z - BA z)‖². Position embeddings are smooth over the grid: Σ_t ‖Γ^½ (p_t - (BA)_t)‖² over the
patches t. Γ is the mean outer product of the loss gradients of a patch token. Both are Eckart-Young in a metric.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..allocation import ErrorCurve
from ..statistics import Moments, TokenGroups
from .factored import FactoredCandidate, factored_candidate
from .pivots import num_pivots


@dataclass(frozen=True)
class EmbeddingCandidates:
    """projection: of the identity (d, d) that the projections z go through, whose mean is projection_mean (d,).
    positions: of the patches' position embeddings less their mean, positions_mean: (patches, d) and (d,)."""

    projection: FactoredCandidate
    projection_mean: Tensor
    positions: FactoredCandidate
    positions_mean: Tensor

    def curves(
        self, largest: Mapping[str, int], costs: Mapping[str, int], multiple: int, pivot: int = 0
    ) -> dict[str, ErrorCurve]:
        """Of the pieces named in `largest`: see `FactoredCandidate.curve`. costs: of one rank. Half a squared gradient
        is a loss. pivot: what each of the projection's saves for one rank."""
        scaled = {"projection": (self.projection, 0.5 * len(self.positions.expand)), "positions": (self.positions, 0.5)}
        pieces = {name: (*scaled[name], rank) for name, rank in largest.items()}
        curves = {
            name: piece.curve(scale, rank, costs[name], multiple) for name, (piece, scale, rank) in pieces.items()
        }
        if "projection" in curves:
            ranks, hidden_size = range(1 + largest["projection"]), len(self.projection_mean)
            saved = np.array([pivot * rank * num_pivots([rank], hidden_size) for rank in ranks] + [0])
            curves["projection"] = replace(curves["projection"], saved=saved)
        return curves


def embedding_candidates(projections: Moments, positions: Tensor, gradient: TokenGroups) -> EmbeddingCandidates:
    """projections: moments of z (d). positions (patches, d). gradient: at the output of the first attention, the
    nearest that is collected; on DeiT-tiny the curves are 1.1 times those of the gradient at the embeddings."""
    metric = gradient.other.second / gradient.other.count
    covariance = projections.covariance() / projections.count
    mean, identity = positions.double().mean(0), torch.eye(len(metric), dtype=torch.float64)
    places = torch.eye(len(positions), dtype=torch.float64)
    return EmbeddingCandidates(
        projection=factored_candidate(identity, metric, covariance),
        projection_mean=projections.first / projections.count,
        positions=factored_candidate(positions.double() - mean, places, metric),
        positions_mean=mean,
    )
