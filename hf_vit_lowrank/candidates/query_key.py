"""Fewer inner dimensions for the query-key product of a head.

A head's scores are q_iᵀ k_j. Replacing the identity between q and k by a rank-r matrix K changes them by
q_iᵀ (I - K) k_j, in the mean square over tokens ‖Q^½ (I - K) C^½‖² with Q = E[q qᵀ] and C the covariance of the keys of
an image (a softmax over j does not see what all keys share). Eckart-Young: the best K comes from the truncated SVD of
Q^½ C^½. In terms of the weights this is the truncated SVD of Σ^½ M Cov_x^½ of design 3.2, in e x e matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import square_root


@dataclass(frozen=True)
class QueryKeyCandidate:
    """One head. `errors[r]` is the sum of squared changes of the scores at rank r, r = 0..e."""

    errors: Tensor
    query_map: Tensor
    key_map: Tensor

    def maps(self, rank: int) -> tuple[Tensor, Tensor]:
        """(rank, e) maps to put in front of the head's query and key weights."""
        return self.query_map[:rank], self.key_map[:rank]


@dataclass(frozen=True)
class QueryKeyLayer:
    """The heads of one layer. `errors[k]` is the sum of the heads' errors, each times its scale, with k dimensions left
    in all heads together, k = 0..heads · e: the best split, but that no head falls below one while there are enough.
    `even_errors[r]` is the same with r dimensions left in every head, r = 0..e."""

    heads: list[QueryKeyCandidate]
    errors: Tensor
    order: Tensor
    even_errors: Tensor

    def head_ranks(self, size: int) -> list[int]:
        """Dimensions left per head when `size` are left in all."""
        head_size = len(self.order) // len(self.heads)
        return torch.bincount(self.order[:size] // head_size, minlength=len(self.heads)).tolist()


def query_key_layer(heads: list[QueryKeyCandidate], scales: list[float]) -> QueryKeyLayer:
    """A head's directions are worth less and less, so that taking the best of all heads is the best for each size."""
    errors = torch.stack([scale * head.errors for head, scale in zip(heads, scales, strict=True)])
    gains = errors[:, :-1] - errors[:, 1:]
    wanted = gains.clone()
    wanted[:, 0] = torch.inf
    order = wanted.flatten().sort(descending=True, stable=True).indices
    left = gains.flatten()[order].flip(0).cumsum(0).flip(0)
    return QueryKeyLayer(heads, torch.cat((left, left.new_zeros(1))), order, errors.sum(0))


def query_key_candidate(query_moment: Tensor, key_covariance: Tensor) -> QueryKeyCandidate:
    """Both (e, e), summed or averaged alike; errors come in the product of their units.

    The maps share the singular values evenly, so that queries and keys keep comparable magnitudes (half precision).
    """
    query_root, query_inverse = square_root(query_moment)
    key_root, key_inverse = square_root(key_covariance)
    left, singular, right = torch.linalg.svd(query_root @ key_root)
    errors = torch.cat((singular.square().flip(0).cumsum(0).flip(0), singular.new_zeros(1)))
    scale = singular.sqrt()
    # query_mapᵀ key_map = Q^-½ U S Vᵀ C^-½, of which the first r rows give the best rank r.
    query_map = (query_inverse @ left * scale).mT
    key_map = (key_inverse @ right.mT * scale).mT
    return QueryKeyCandidate(errors, query_map, key_map)
