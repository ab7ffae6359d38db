"""Error curves, costs and a budget to one size for every piece of the network (design 3.4). Pure; no torch."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

SMALLEST_SIZE = 1
# The schedule of `energy_greedy`, in steps (arXiv 2402.06004).
GREEDY_DECAY = 80.0
GREEDY_STEPS = 500


@dataclass(frozen=True)
class ErrorCurve:
    """`errors[k]` is the predicted rise of the loss at inner size k = 0..len-1, which costs k times `unit_cost`, less
    `saved[k]` where some of that is for nothing.

    The largest size is the dense one, with the error of index -1; the least that is chosen is `smallest`. `allocate`
    chooses multiples of `step`, or the largest size.
    """

    errors: np.ndarray
    unit_cost: int
    smallest: int = SMALLEST_SIZE
    step: int = 1
    saved: np.ndarray | None = None

    def cost(self, size: int) -> int:
        return size * self.unit_cost - (0 if self.saved is None else int(self.saved[size]))

    @property
    def largest(self) -> int:
        return len(self.errors) - 1

    @cached_property
    def sizes(self) -> list[int]:
        """All that may be chosen, ascending; what costs no less than a larger size is none."""
        first = -(-self.smallest // self.step) * self.step
        chosen = [self.largest]
        for size in reversed(range(first, self.largest, self.step)):
            if self.cost(size) < self.cost(chosen[-1]):
                chosen.append(size)
        return chosen[::-1]


class ImpossibleBudgetError(Exception):
    """The budget lies below the cost of the smallest sizes; `smallest_cost` says what that is."""

    def __init__(self, smallest_cost: int):
        super().__init__(f"The smallest sizes cost {smallest_cost}.")
        self.smallest_cost = smallest_cost


def allocate(curves: Sequence[ErrorCurve], budget: int) -> list[int]:
    """Sizes with the least sum of errors whose costs stay within `budget`.

    Each curve is walked along its lower convex hull, the steepest saving per cost first (the Lagrangian solution,
    optimal for the hulls whenever the budget ends on a step); what is left goes to single steps of the best saving.

    Raises:
        ImpossibleBudgetError: even the smallest sizes cost more.
    """
    sizes = [curve.sizes[0] for curve in curves]
    left = budget - sum(curve.cost(size) for size, curve in zip(sizes, curves, strict=True))
    if left < 0:
        raise ImpossibleBudgetError(budget - left)
    steps = [(-slope, piece, size) for piece, curve in enumerate(curves) for slope, size in _hull_steps(curve)]
    for _, piece, size in sorted(steps):
        cost = curves[piece].cost(size) - curves[piece].cost(sizes[piece])
        if cost > left:
            break
        sizes[piece], left = size, left - cost
    return _spend(curves, sizes, left)


def allocate_pair(first: ErrorCurve, second: ErrorCurve, budget: int) -> tuple[int, int]:
    """The sizes of two pieces with the least sum of errors whose costs stay within `budget`, by trying all.

    Raises:
        ImpossibleBudgetError: even the smallest sizes cost more.
    """
    least = first.smallest * first.unit_cost + second.smallest * second.unit_cost
    if least > budget:
        raise ImpossibleBudgetError(least)
    pairs = []
    for size in range(first.smallest, first.largest + 1):
        affordable = min(second.largest, (budget - size * first.unit_cost) // second.unit_cost)
        if affordable >= second.smallest:
            other = second.smallest + int(np.argmin(second.errors[second.smallest : affordable + 1]))
            pairs.append((float(first.errors[size] + second.errors[other]), size, other))
    return min(pairs)[1:]


def hull_corners(curve: ErrorCurve) -> list[int]:
    """Sizes at the corners of the lower convex hull, ascending."""
    first, *rest = curve.sizes
    corners = [first]
    for size in rest:
        while len(corners) > 1 and _saving(curve, corners[-2], corners[-1]) <= _saving(curve, corners[-1], size):
            corners.pop()
        corners.append(size)
    return corners


def hull_slopes(curve: ErrorCurve) -> np.ndarray:
    """For each size 0, 1, … of a curve what its lower convex hull falls by, per cost, from there on; 0 at the end."""
    slopes, smaller = np.zeros(curve.largest + 1), 0
    for slope, larger in _hull_steps(curve):
        slopes[smaller:larger] = slope
        smaller = larger
    return slopes


def _hull_steps(curve: ErrorCurve) -> list[tuple[float, int]]:
    """(saving per cost, size reached) of each edge of the lower convex hull, savings falling."""
    return [(_saving(curve, smaller, larger), larger) for smaller, larger in pairwise(hull_corners(curve))]


def _saving(curve: ErrorCurve, smaller: int, larger: int) -> float:
    return float(curve.errors[smaller] - curve.errors[larger]) / (curve.cost(larger) - curve.cost(smaller))


def _spend(curves: Sequence[ErrorCurve], sizes: list[int], left: int) -> list[int]:
    """Add single steps, the best saving per cost first, as long as one fits."""
    while True:
        best, chosen, reached = -1.0, None, 0
        for piece, curve in enumerate(curves):
            larger = curve.sizes[bisect_right(curve.sizes, sizes[piece]) :]
            if larger and curve.cost(larger[0]) - curve.cost(sizes[piece]) <= left:
                saving = _saving(curve, sizes[piece], larger[0])
                if saving > best:
                    best, chosen, reached = saving, piece, larger[0]
        if chosen is None:
            return sizes
        left -= curves[chosen].cost(reached) - curves[chosen].cost(sizes[chosen])
        sizes[chosen] = reached


def energy_greedy(curves: Sequence[ErrorCurve], budget: int) -> list[int]:
    """Sizes whose costs stay within `budget`, by the greedy energy rule of arXiv 2402.06004 (design 3.4).

    Every curve starts at its largest size and is divided by its error at size 0, which makes it the share of the energy
    that is lost. The cost may fall as N(t) = N_budget + (N_0 - N_budget) exp(-t / 80), t = 1..500, then to the budget:
    in each step the piece that loses the least energy for it is made smaller by as much as the step demands. Where a
    piece is used up before, the next one follows, losses compared per cost.

    Raises:
        ImpossibleBudgetError: even the smallest sizes cost more.
    """
    smallest = sum(curve.smallest * curve.unit_cost for curve in curves)
    if smallest > budget:
        raise ImpossibleBudgetError(smallest)
    sizes = [curve.largest for curve in curves]
    cost = start = sum(curve.largest * curve.unit_cost for curve in curves)
    for step in range(1, GREEDY_STEPS + 1):
        share = math.exp(-step / GREEDY_DECAY) if step < GREEDY_STEPS else 0.0
        allowed = budget + (start - budget) * share
        while cost > allowed:
            piece, smaller = _least_loss(curves, sizes, cost - allowed)
            cost -= (sizes[piece] - smaller) * curves[piece].unit_cost
            sizes[piece] = smaller
    return sizes


def _least_loss(curves: Sequence[ErrorCurve], sizes: Sequence[int], excess: float) -> tuple[int, int]:
    """The piece that loses the least share of its energy per cost when `excess` is taken from it, and its size then."""
    best = (math.inf, 0, 0)
    for piece, (curve, size) in enumerate(zip(curves, sizes, strict=True)):
        smaller = max(curve.smallest, size - math.ceil(excess / curve.unit_cost))
        if smaller < size:
            lost = float(curve.errors[smaller] - curve.errors[size]) / (float(curve.errors[0]) or 1.0)
            best = min(best, (lost / ((size - smaller) * curve.unit_cost), piece, smaller))
    return best[1], best[2]
