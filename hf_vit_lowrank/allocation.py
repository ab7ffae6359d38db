"""Error curves, costs and a budget to one size for every piece of the network (design 3.4). Pure; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

SMALLEST_SIZE = 1


@dataclass(frozen=True)
class ErrorCurve:
    """`errors[k]` is the predicted rise of the loss at inner size k = 0..len-1; each unit of size costs `unit_cost`.

    The largest size is the dense one, with the error of index -1; the least that is chosen is SMALLEST_SIZE.
    """

    errors: np.ndarray
    unit_cost: int

    @property
    def largest(self) -> int:
        return len(self.errors) - 1


class ImpossibleBudgetError(Exception):
    """The budget lies below the cost of the smallest sizes; `smallest_cost` says what that is."""

    def __init__(self, smallest_cost: int):
        super().__init__(f"The smallest sizes cost {smallest_cost}.")
        self.smallest_cost = smallest_cost


def allocate(curves: Sequence[ErrorCurve], budget: int) -> list[int]:
    """Sizes with the least sum of errors whose costs stay within `budget`.

    Each curve is walked along its lower convex hull, the steepest saving per cost first (the Lagrangian solution,
    optimal for the hulls whenever the budget ends on a step); what is left goes to single units of the best saving.

    Raises:
        ImpossibleBudgetError: even the smallest sizes cost more.
    """
    sizes = [SMALLEST_SIZE] * len(curves)
    left = budget - sum(SMALLEST_SIZE * curve.unit_cost for curve in curves)
    if left < 0:
        raise ImpossibleBudgetError(budget - left)
    steps = [(-slope, piece, size) for piece, curve in enumerate(curves) for slope, size in _hull_steps(curve)]
    for _, piece, size in sorted(steps):
        cost = (size - sizes[piece]) * curves[piece].unit_cost
        if cost > left:
            break
        sizes[piece], left = size, left - cost
    return _spend(curves, sizes, left)


def _hull_steps(curve: ErrorCurve) -> list[tuple[float, int]]:
    """(saving per cost, size reached) of each edge of the lower convex hull, savings falling."""
    corners = [SMALLEST_SIZE]
    for size in range(SMALLEST_SIZE + 1, curve.largest + 1):
        while len(corners) > 1 and _saving(curve, corners[-2], corners[-1]) <= _saving(curve, corners[-1], size):
            corners.pop()
        corners.append(size)
    return [(_saving(curve, smaller, larger), larger) for smaller, larger in pairwise(corners)]


def _saving(curve: ErrorCurve, smaller: int, larger: int) -> float:
    return float(curve.errors[smaller] - curve.errors[larger]) / ((larger - smaller) * curve.unit_cost)


def _spend(curves: Sequence[ErrorCurve], sizes: list[int], left: int) -> list[int]:
    """Add single units, the best saving per cost first, as long as one fits."""
    while True:
        best, chosen = -1.0, None
        for piece, curve in enumerate(curves):
            if sizes[piece] < curve.largest and curve.unit_cost <= left:
                saving = _saving(curve, sizes[piece], sizes[piece] + 1)
                if saving > best:
                    best, chosen = saving, piece
        if chosen is None:
            return sizes
        sizes[chosen] += 1
        left -= curves[chosen].unit_cost
