"""Sums over batches that have the same bits in any order, and so in any number of processes.

Float64 adds float32 numbers without error if they are whole multiples of a power of two that is not too small. So each
number is rounded to such multiples before it is added, by far less than it was rounded when it was computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import processes

# Binary digits by which the unit of a value is below its size. Products of two values are then rounded to 2⁻³⁰ of
# their sizes, against the 2⁻²⁴ of float32; float64 has 23 digits left for the sum over batches.
_DIGITS = 15
# Values smaller than the largest by so many digits, or smaller than 2⁻³⁵, have its unit: no product may leave float32.
_RANGE, _SMALLEST = 32, -35


def units_of(values: Tensor) -> Tensor:
    """Powers of two (..., n) to measure values (..., tokens, n) in, by their size over this batch: the root of their
    sum of squares. The main process's, so that all processes have the same."""
    exponents = values.square().sum(-2).sqrt().cpu().double().log2().floor()
    least = max(float(exponents.max()) - _RANGE, _SMALLEST)
    return processes.from_main(torch.exp2(exponents.clamp_min(least) - _DIGITS).float()).to(values.device)


def rounded_sum(values: Tensor, units: Tensor) -> Tensor:
    """The sum over tokens of values (..., tokens, n)."""
    return _rounded(values.sum(-2), units * 2.0**-_DIGITS)


def rounded_products(x: Tensor, y: Tensor, x_units: Tensor, y_units: Tensor) -> Tensor:
    """xᵀ y (..., n, m) of (..., tokens, n) and (..., tokens, m)."""
    return _rounded(x.mT @ y, x_units.unsqueeze(-1) * y_units.unsqueeze(-2))


def _rounded(terms: Tensor, grid: Tensor) -> Tensor:
    """In place, to whole multiples of the powers of two in `grid`; on the CPU, ready to be added in float64."""
    return terms.div_(grid).round_().mul_(grid).cpu()
