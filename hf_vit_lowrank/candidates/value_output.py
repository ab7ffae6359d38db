"""Fewer inner dimensions for the value-output product of the heads of one layer.

A layer adds W_o c, c the contexts (attention-averaged values) of all heads side by side. Inside a head any basis of the
context may be chosen for free. The best rank r of one head alone is the truncated SVD of Γ^½ W_h C_h^½ (Eckart-Young;
design 3.2), C_h the covariance of its context, since the mean goes into the output bias. That basis is taken for every
head, and the dimensions of all heads together are then removed one by one with W_o refitted on the rest, so that what
another head carries too is not kept twice. For a single head this is the truncated SVD itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import square_root
from .elimination import Elimination, eliminate

RIDGE = 1e-6


@dataclass(frozen=True)
class ValueOutputCandidate:
    """One layer. `basis` (heads, e, e): row i of head h is the i-th direction of its context, the most useful first."""

    basis: Tensor
    elimination: Elimination

    def head_ranks(self, size: int) -> list[int]:
        """Dimensions left per head when `size` are left in all."""
        return self.head_counts()[size].tolist()

    def head_counts(self) -> Tensor:
        """Those of all sizes, 0, 1, …: (sizes, heads)."""
        heads, head_size, _ = self.basis.shape
        left = self.elimination.order.flip(0) // head_size
        counts = (left.unsqueeze(1) == torch.arange(heads)).cumsum(0)
        return torch.cat((counts.new_zeros(1, heads), counts))


def value_output_candidate(
    output_weight: Tensor, context_covariance: Tensor, metric: Tensor, heads: int, even: bool = False
) -> ValueOutputCandidate:
    """output_weight (d, heads · e), context_covariance (heads · e, heads · e), metric Γ (d, d).

    even: the heads lose dimensions in turns, so that at every multiple of `heads` they have the same number.
    """
    root, _ = square_root(metric)
    head_size = output_weight.shape[1] // heads
    weights = output_weight.double().unflatten(1, (heads, head_size)).movedim(1, 0)
    blocks = context_covariance.unflatten(0, (heads, head_size)).unflatten(2, (heads, head_size))
    own = torch.stack([blocks[head, :, head] for head in range(heads)])
    context_root, context_inverse = square_root(own)
    _, _, right = torch.linalg.svd(root @ weights @ context_root, full_matrices=False)
    basis = right @ context_inverse
    # c = C^½ V c' on the support of C, hence W_h C^½ Vᵀ in the new coordinates.
    rotated_weight = (weights @ context_root @ right.mT).movedim(0, 1).flatten(1)
    rotation = torch.block_diag(*basis)
    rotated_covariance = rotation @ context_covariance @ rotation.mT
    groups = torch.arange(heads).repeat_interleave(head_size) if even else None
    return ValueOutputCandidate(basis, eliminate(rotated_weight, rotated_covariance, root, RIDGE, groups))
