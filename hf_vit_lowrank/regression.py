"""Least squares from sums over tokens, drawn towards a prior by as much as two halves of the images ask for.

What a smaller model's inputs cannot say about a target looks like noise, and behind late blocks, where little but the
tokens read counts, there are hardly more of those than inputs: without a strong ridge the noise is learnt by heart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import processes
from .exact_sums import add_products, rounded_sum, units_of
from .linalg import eigh, ridge_solve
from .statistics import Moments, TokenGroups

# Ridges that are tried, half a decade from one to the next, from the middle one in the direction that helps.
RIDGES = tuple(10.0 ** (half_decade / 2) for half_decade in range(-12, 5))
START = RIDGES.index(0.1)
# Of the metric, in which ridges are compared: with 768 targets in half the time that all of them take.
DIRECTIONS = 64


class RegressionSums:
    """What a regression from n inputs to m targets takes from tokens. Other tokens than those read weigh
    `other_weight`; `watched` values beside the inputs have their moments taken too."""

    def __init__(self, inputs: int, targets: int, other_weight: float, watched: int = 0):
        self.halves = tuple(_Sums(inputs, targets, other_weight, watched) for _ in range(2))
        self.batches = 0

    def add(self, inputs: Tensor, targets: Tensor, num_read: int) -> None:
        """(images, tokens, n + watched) and (images, tokens, m); every other image of a batch goes to one half, in
        whichever process, and single images in turn."""
        first, second = self.halves
        turn = self.batches % 2 if len(inputs) == 1 else 0
        for half, start in ((first, turn), (second, 1 - turn)):
            half.add(inputs[start::2], targets[start::2], num_read)
            second.share_units(first)
        self.batches += 1

    def add_up(self) -> Regression:
        """Over the batches of all processes; nothing is added after this."""
        for half in self.halves:
            half.add_up()
        return Regression([half.weighted() for half in self.halves])


class Solution(NamedTuple):
    """Weight (m, n), bias (m,), and the ridge that the halves asked for."""

    weight: Tensor
    bias: Tensor
    ridge: float


class Regression:
    """Weighted least squares with a bias, from the sums of two halves of the images."""

    def __init__(self, halves: Sequence[WeightedSums]):
        self.halves, self.everything = halves, halves[0].plus(halves[1])

    @property
    def seen(self) -> Moments:
        """Of inputs and watched values side by side."""
        return self.everything.inputs

    def covariance(self) -> Tensor:
        """Of the inputs, summed over tokens: (n, n)."""
        return self.seen.part(slice(len(self.everything.cross))).covariance()

    def solve(self, prior: Tensor, metric: Tensor, near: float | None = None) -> Solution:
        """The weight is drawn towards `prior` (m, n) where the data say little.

        The ridge is the one with which the solutions of the two halves of the images do best on each other, in the
        strongest directions of the metric Γ (m, m); the search begins at the one of RIDGES that is `near`. For twice
        the images half of it would do in theory, but an error comes on top of those of the blocks before: KL 1.33
        against 1.28 nats on held-back images of DeiT-tiny, -60 %.
        """
        prior = prior.detach().cpu().double()
        start = START if near is None else RIDGES.index(near)
        return self.with_ridge(prior, self._ridge(prior, metric, start))

    def with_ridge(self, prior: Tensor, ridge: float) -> Solution:
        """For a ridge that is given; prior (m, n) in float64."""
        weight = prior + self.everything.equations(prior).solve(ridge)
        explained = weight @ self.seen.first[: weight.shape[1]]
        return Solution(weight, (self.everything.target - explained) / self.seen.count, ridge)

    def _ridge(self, prior: Tensor, metric: Tensor, start: int) -> float:
        if not all(half.inputs.count for half in self.halves):
            return RIDGES[-1]  # one image says nothing about another
        directions = _strongest(metric)
        halves = [half.equations(prior).towards(directions) for half in self.halves]

        @cache
        def error(index: int) -> float:
            return sum(seen.error(fitted.solve(RIDGES[index])) for fitted, seen in (halves, halves[::-1]))

        return RIDGES[descend(error, start, len(RIDGES))]


def _strongest(metric: Tensor) -> Tensor:
    """(m, DIRECTIONS): the directions that matter most to a metric (m, m), as long as they matter."""
    values, vectors = eigh(metric)
    return (vectors * values.clamp_min(0.0).sqrt())[:, -DIRECTIONS:]


def descend(error: Callable[[int], float], start: int, count: int) -> int:
    """The index from which both neighbours among 0 … count - 1 have no smaller error, on the way down from `start`."""
    best = start
    for step in (1, -1):
        while 0 <= best + step < count and error(best + step) < error(best):
            best += step
    return best


@dataclass(frozen=True)
class NormalEquations:
    """covariance (n, n) of the inputs and cross (n, m) = Cov(inputs, targets), summed over tokens."""

    covariance: Tensor
    cross: Tensor

    def towards(self, directions: Tensor) -> NormalEquations:
        """For the targets' components (k) in some directions (m, k)."""
        return NormalEquations(self.covariance, self.cross @ directions)

    def solve(self, ridge: float) -> Tensor:
        """The weight (m, n) nearest to the data and, by a share `ridge` of the mean variance, to zero."""
        return ridge_solve(self.covariance, self.cross, ridge)

    def error(self, weight: Tensor) -> float:
        """Sum of ‖y - weight @ x‖² but for what is the same for all weights."""
        return float((weight * (weight @ self.covariance - 2 * self.cross.mT)).sum())


class _Sums:
    def __init__(self, inputs: int, targets: int, other_weight: float, watched: int):
        self.other_weight, self.size = other_weight, inputs
        self.groups = TokenGroups.zeros(inputs + watched)
        self.read, self.other = _CrossMoments(inputs, targets), _CrossMoments(inputs, targets)

    def add(self, inputs: Tensor, targets: Tensor, num_read: int) -> None:
        self.groups.add(inputs, num_read)
        for group, tokens in ((self.read, slice(num_read)), (self.other, slice(num_read, None))):
            x, y = inputs[:, tokens, : self.size].flatten(0, 1), targets[:, tokens].flatten(0, 1)
            if group.units is None:
                everything = inputs[..., : self.size].flatten(0, 1), targets.flatten(0, 1)
                group.units = units_of(everything[0], len(x)), units_of(everything[1], len(x))
            group.add(x, y)

    def share_units(self, source: _Sums) -> None:
        """Measure in the units of another, which has seen the first image."""
        self.read.units, self.other.units = source.read.units, source.other.units
        self.groups.read.units, self.groups.other.units = source.groups.read.units, source.groups.other.units

    def add_up(self) -> None:
        self.groups.add_up()
        processes.add_up(self.read.target, self.read.cross, self.other.target, self.other.cross)

    def weighted(self) -> WeightedSums:
        read, other, weight = self.read, self.other, self.other_weight
        return WeightedSums(
            self.groups.weighted(weight),
            read.target + weight * other.target,
            read.cross + weight * other.cross,
        )


@dataclass(frozen=True)
class WeightedSums:
    """Moments of the inputs (n, and what is watched), sums of y (m) and of x yᵀ (n, m)."""

    inputs: Moments
    target: Tensor
    cross: Tensor

    def plus(self, other: WeightedSums) -> WeightedSums:
        return WeightedSums(self.inputs.plus(other.inputs, 1.0), self.target + other.target, self.cross + other.cross)

    def equations(self, prior: Tensor) -> NormalEquations:
        """For what is to be added to the weight `prior` (m, n)."""
        inputs = self.inputs.part(slice(len(self.cross)))
        covariance, cross = inputs.covariance(), self.cross - torch.outer(inputs.first, self.target) / inputs.count
        return NormalEquations(covariance, cross - covariance @ prior.mT)


class _CrossMoments:
    """Sums over tokens of y (m) and of x yᵀ (n, m), in float64 and with the same bits in any order."""

    def __init__(self, inputs: int, targets: int):
        self.target = torch.zeros(targets, dtype=torch.float64)
        self.cross = torch.zeros(inputs, targets, dtype=torch.float64)
        self.units: tuple[Tensor, Tensor] | None = None  # of x and y, which the first batch decides

    def add(self, x: Tensor, y: Tensor) -> None:
        """(tokens, n) and (tokens, m)."""
        assert self.units is not None
        self.target += rounded_sum(y, self.units[1])
        add_products(self.cross, x, y, *self.units)
