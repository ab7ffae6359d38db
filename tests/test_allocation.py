"""The allocation against exhaustive search, and against uniform sizes."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_vit_lowrank.allocation import SMALLEST_SIZE, ErrorCurve, ImpossibleBudgetError, allocate, allocate_pair


@st.composite
def convex_curves(draw, unit_cost=None):
    drops = draw(st.lists(st.floats(0.01, 100), min_size=2, max_size=5))
    errors = np.concatenate((np.cumsum(sorted(drops))[::-1], [0.0]))
    return ErrorCurve(errors, unit_cost or draw(st.integers(1, 7)))


def total_error(curves, sizes):
    return sum(float(curve.errors[size]) for curve, size in zip(curves, sizes, strict=True))


def total_cost(curves, sizes):
    return sum(curve.unit_cost * size for curve, size in zip(curves, sizes, strict=True))


def best_by_search(curves, budget):
    choices = product(*(range(SMALLEST_SIZE, curve.largest + 1) for curve in curves))
    return min(total_error(curves, sizes) for sizes in choices if total_cost(curves, sizes) <= budget)


@given(st.lists(convex_curves(unit_cost=3), min_size=1, max_size=4), st.integers(12, 60))
@settings(max_examples=100, deadline=None)
def test_convex_curves_of_equal_cost_are_solved_exactly(curves, budget):
    sizes = allocate(curves, budget)
    assert total_cost(curves, sizes) <= budget
    assert total_error(curves, sizes) == pytest.approx(best_by_search(curves, budget))


@given(st.lists(convex_curves(), min_size=1, max_size=4), st.integers(28, 80))
@settings(max_examples=100, deadline=None)
def test_unequal_costs_lose_at_most_one_step_against_search(curves, budget):
    sizes = allocate(curves, budget)
    largest_step = max(float(curve.errors[1] - curve.errors[-1]) for curve in curves)
    assert total_cost(curves, sizes) <= budget
    assert total_error(curves, sizes) <= best_by_search(curves, budget) + largest_step


@given(st.lists(convex_curves(), min_size=1, max_size=4), st.integers(0, 2), st.integers(0, 200))
def test_what_a_size_has_for_nothing_is_spent_as_well(curves, saved, more):
    curves = [
        replace(curve, unit_cost=30, saved=saved * np.arange(curve.largest + 1) ** 2)  # each unit costs less
        for curve in curves
    ]
    budget = sum(curve.cost(1) for curve in curves) + more
    sizes = allocate(curves, budget)
    left = budget - sum(curve.cost(size) for curve, size in zip(curves, sizes, strict=True))
    assert left >= 0
    for curve, size in zip(curves, sizes, strict=True):
        assert size == curve.largest or curve.cost(size + 1) - curve.cost(size) > left


@given(convex_curves(), st.lists(st.integers(0, 40), min_size=6, max_size=6), st.integers(0, 60))
def test_of_sizes_that_cost_no_less_than_a_larger_one_none_is_chosen(curve, saved, more):
    curve = replace(curve, unit_cost=20, saved=np.array(saved[: curve.largest + 1]))
    costs = {size: curve.cost(size) for size in range(1, curve.largest + 1)}
    cheapest = min(costs.values())
    (size,) = allocate([curve], cheapest + more)
    assert size == max(size for size, cost in costs.items() if cost <= cheapest + more)
    with pytest.raises(ImpossibleBudgetError) as raised:
        allocate([curve], cheapest - 1)
    assert raised.value.smallest_cost == cheapest


@given(st.lists(convex_curves(unit_cost=2), min_size=1, max_size=5), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_never_worse_than_uniform(curves, uniform):
    sizes = [min(uniform, curve.largest) for curve in curves]
    chosen = allocate(curves, total_cost(curves, sizes))
    assert total_error(curves, chosen) <= total_error(curves, sizes) + 1e-9


@given(st.lists(convex_curves(), min_size=1, max_size=5), st.integers(35, 120))
@settings(max_examples=100, deadline=None)
def test_nothing_that_still_fits_is_left_over(curves, budget):
    sizes = allocate(curves, budget)
    left = budget - total_cost(curves, sizes)
    assert all(size == curve.largest or curve.unit_cost > left for curve, size in zip(curves, sizes, strict=True))


def test_a_bend_in_a_curve_is_jumped():
    # The second unit alone saves nothing, both together save more per cost than the other curve.
    bent = ErrorCurve(np.array([30.0, 20.0, 20.0, 0.0]), 1)
    straight = ErrorCurve(np.array([12.0, 6.0, 0.0]), 1)
    assert allocate([bent, straight], 4) == [3, 1]


@given(st.lists(convex_curves(), min_size=1, max_size=5), st.integers(60, 120), st.integers(2, 3))
@settings(max_examples=50, deadline=None)
def test_sizes_are_multiples_or_whole(curves, budget, step):
    stepped = [ErrorCurve(curve.errors, curve.unit_cost, step=step) for curve in curves]
    least = total_cost(stepped, [min(step, curve.largest) for curve in stepped])
    if least > budget:
        return
    sizes = allocate(stepped, budget)
    assert total_cost(stepped, sizes) <= budget
    assert all(size % step == 0 or size == curve.largest for curve, size in zip(stepped, sizes, strict=True))


@given(convex_curves(), convex_curves(), st.integers(14, 80))
@settings(max_examples=100, deadline=None)
def test_a_pair_is_solved_exactly(first, second, budget):
    sizes = allocate_pair(first, second, budget)
    assert total_cost([first, second], sizes) <= budget
    assert total_error([first, second], sizes) == best_by_search([first, second], budget)
    with pytest.raises(ImpossibleBudgetError):
        allocate_pair(first, second, first.unit_cost + second.unit_cost - 1)


def test_impossible_budget_says_what_the_smallest_sizes_cost():
    with pytest.raises(ImpossibleBudgetError) as error:
        allocate([ErrorCurve(np.array([2.0, 1.0]), 5), ErrorCurve(np.array([2.0, 1.0]), 7)], 11)
    assert error.value.smallest_cost == 12
