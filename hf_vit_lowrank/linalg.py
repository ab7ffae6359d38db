"""Decompositions of moments in float64 that cannot fail on rank-deficient ones."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from .errors import RunError, reason

logger = logging.getLogger(__name__)

# Eigenvalues below this share of the largest count as zero: they are rounding of float32 products.
RELATIVE_FLOOR = 1e-10
# What sums of float32 products of a few images leave where exact ones would leave nothing.
FLOAT32_ROUNDING = 1e-6
# Of inputs that never vary; far from underflow when its inverse is squared.
_SMALLEST_FLOOR = 1e-100


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, rising, and eigenvectors of symmetric matrices (..., n, n); where the device fails, by the CPU.

    Raises:
        RunError: an entry is not finite.
    """
    if not matrix.isfinite().all():
        raise RunError("Moments of the activations are not finite: the source model overflows on these images.")
    try:
        return torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError as error:
        logger.warning("eigenvalues on %s failed (%s): once more on the CPU", matrix.device, reason(error))
        values, vectors = torch.linalg.eigh(matrix.cpu())
        return values.to(matrix.device), vectors.to(matrix.device)


def square_root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric root and its pseudo-inverse of positive semi-definite matrices (..., n, n), by eigh."""
    values, vectors = eigh(matrix.double())
    floor = RELATIVE_FLOOR * values[..., -1:].clamp_min(torch.finfo(torch.float64).tiny)
    kept = values > floor
    root = torch.where(kept, values, 0.0).sqrt()
    inverse = torch.where(kept, values, 1.0).rsqrt() * kept
    return (vectors * root.unsqueeze(-2)) @ vectors.mT, (vectors * inverse.unsqueeze(-2)) @ vectors.mT


def ridge_solve(covariance: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Least squares: the map (m, n) from inputs of covariance (n, n) to targets, cross (n, m) = Cov(inputs, targets).

    Dead and dependent inputs get zero or shared weights. By Cholesky, at a tenth of the time of eigh, which takes over
    where rounding has left the covariance with negative eigenvalues beyond the ridge.
    """
    factor, floor = _ridged_cholesky(covariance, ridge)
    if factor is not None:
        return torch.cholesky_solve(cross, factor).mT
    values, vectors = eigh(covariance)
    return ((vectors / (values.clamp_min(0.0) + floor)) @ (vectors.mT @ cross)).mT


def ridge_inverse(covariance: Tensor, ridge: float) -> Tensor:
    """(n, n): what `ridge_solve` multiplies by, at a third of the time of solving for the identity."""
    factor, _ = _ridged_cholesky(covariance, ridge)
    if factor is not None:
        return torch.cholesky_inverse(factor)
    return ridge_solve(covariance, torch.eye(len(covariance), dtype=covariance.dtype), ridge)


def _ridged_cholesky(covariance: Tensor, ridge: float) -> tuple[Tensor | None, Tensor]:
    """The factor, None where there is none that can be relied on, and what was added to the diagonal."""
    floor = (max(ridge, RELATIVE_FLOOR) * covariance.diagonal().mean()).clamp_min(_SMALLEST_FLOOR)
    ridged = covariance.clone()
    ridged.diagonal().add_(floor)
    factor, failed = torch.linalg.cholesky_ex(ridged)
    reliable = not failed and factor.diagonal().square().min() > floor / 2
    return factor if reliable else None, floor
