"""Sums over batches that have the same bits in any order, and so in any number of processes.

Float64 adds float32 numbers without error if they are whole multiples of a power of two that is not too small. So each
number is rounded to such multiples before it is added, by far less than it was rounded when it was computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import processes

# Binary digits by which the unit of a value is below its size. Products of two values are then rounded to 2⁻²⁶ of
# their sizes, against the 2⁻²⁴ of float32; float64 has 27 digits left for sums over batches that are larger.
_DIGITS = 13
# Values smaller than the largest by so many digits, or smaller than 2⁻³⁵, have its unit: no product may leave float32.
_RANGE, _SMALLEST = 32, -35
_STRIP = 128


def units_of(values: Tensor, tokens: int) -> Tensor:
    """Powers of two (..., n) to measure values in, by their size over so many tokens: the root of the sum of squares.

    values: (..., tokens, n) of a first batch, also those that are not to be summed, lest a value that happens to be
    small be taken for one that always is. The main process's decide, so that all processes have the same units.
    """
    exponents = (tokens * values.square().mean(-2)).sqrt().cpu().double().log2().floor()
    least = max(float(exponents.max()) - _RANGE, _SMALLEST)
    return processes.from_main(torch.exp2(exponents.clamp_min(least) - _DIGITS).float()).to(values.device)


def rounded_sum(values: Tensor, units: Tensor) -> Tensor:
    """The sum over tokens of values (..., tokens, n)."""
    grid = units * 2.0**-_DIGITS
    return (values.sum(-2) / grid).round_().mul_(grid).cpu()


def add_products(total: Tensor, x: Tensor, y: Tensor, x_units: Tensor, y_units: Tensor) -> None:
    """total (..., n, m) += xᵀ y of (..., tokens, n) and (..., tokens, m)."""
    _add_strips(total, x / x_units.unsqueeze(-2), y / y_units.unsqueeze(-2), x_units, y_units, upper=False)


def add_gram(total: Tensor, values: Tensor, units: Tensor) -> None:
    """total (..., n, n) += valuesᵀ values of (..., tokens, n), on and above the diagonal: `mirror` makes the rest."""
    in_units = values / units.unsqueeze(-2)
    _add_strips(total, in_units, in_units, units, units, upper=True)


def mirror(total: Tensor) -> None:
    """Write what is above the diagonal of (..., n, n) below it."""
    for start in range(0, total.shape[-1], _STRIP):
        rows, below = slice(start, start + _STRIP), slice(start + _STRIP, None)
        total[..., below, rows] = total[..., rows, below].mT


def _add_strips(total: Tensor, x: Tensor, y: Tensor, x_units: Tensor, y_units: Tensor, upper: bool) -> None:
    """Of x and y in their units; so few rows at once that what is done to their products stays in the caches."""
    for start in range(0, x.shape[-1], _STRIP):
        rows, columns = slice(start, start + _STRIP), slice(start if upper else 0, None)
        terms = (x[..., rows].mT @ y[..., columns]).round_()
        terms.mul_(x_units[..., rows].unsqueeze(-1)).mul_(y_units[..., columns].unsqueeze(-2))
        total[..., rows, columns] += terms.cpu()
