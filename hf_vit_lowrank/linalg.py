"""Symmetric square roots in float64 that cannot fail on rank-deficient moments."""

from __future__ import annotations

import torch
from torch import Tensor

# Eigenvalues below this share of the largest count as zero: they are rounding of float32 products.
RELATIVE_FLOOR = 1e-10


def square_root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric root and its pseudo-inverse of positive semi-definite matrices (..., n, n), by eigh."""
    values, vectors = torch.linalg.eigh(matrix.double())
    floor = RELATIVE_FLOOR * values[..., -1:].clamp_min(torch.finfo(torch.float64).tiny)
    kept = values > floor
    root = torch.where(kept, values, 0.0).sqrt()
    inverse = torch.where(kept, values, 1.0).rsqrt() * kept
    return (vectors * root.unsqueeze(-2)) @ vectors.mT, (vectors * inverse.unsqueeze(-2)) @ vectors.mT
