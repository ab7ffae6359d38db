"""Regression from sums: the ridge is what the halves of the images ask for, the rest is least squares."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_vit_lowrank.regression import RIDGES, NormalEquations, Regression, RegressionSums, descend

INPUTS, TARGETS, TOKENS, WEIGHT = 6, 3, 5, 0.25


def data(images: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs with means, targets of a linear map with noise, and the map."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(images, TOKENS, INPUTS, generator=generator) + 2
    truth = torch.randn(TARGETS, INPUTS, generator=generator)
    targets = inputs @ truth.mT + 1 + noise * torch.randn(images, TOKENS, TARGETS, generator=generator)
    return inputs, targets, truth.double()


def regression(inputs: torch.Tensor, targets: torch.Tensor, images_at_once: int) -> Regression:
    sums = RegressionSums(INPUTS, TARGETS, WEIGHT)
    for x, y in zip(inputs.split(images_at_once), targets.split(images_at_once), strict=True):
        sums.add(x, y, num_read=1)
    return sums.add_up()


def metric() -> torch.Tensor:
    root = torch.randn(TARGETS, TARGETS, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return root @ root.mT


def centred(inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens as rows times the roots of their weights, their weighted means taken off."""
    weights = torch.full((inputs.shape[1],), WEIGHT, dtype=torch.float64)
    weights[0] = 1.0
    weights = weights.repeat(len(inputs))[:, None]
    x, y = inputs.double().flatten(0, 1), targets.double().flatten(0, 1)
    x, y = (values - (weights * values).sum(0) / weights.sum() for values in (x, y))
    return weights.sqrt() * x, weights.sqrt() * y


def by_hand(inputs: torch.Tensor, targets: torch.Tensor, ridge: float, prior: torch.Tensor) -> torch.Tensor:
    x, y = centred(inputs, targets)
    covariance = x.mT @ x
    ridged = covariance + ridge * covariance.diagonal().mean() * torch.eye(INPUTS, dtype=torch.float64)
    return prior + torch.linalg.solve(ridged, x.mT @ (y - x @ prior.mT)).mT


def foretold(inputs: torch.Tensor, targets: torch.Tensor, ridge: float, prior: torch.Tensor) -> float:
    """Error of each half's solution on the other half."""
    halves = [(inputs[first::2], targets[first::2]) for first in (0, 1)]
    error = 0.0
    for fitted, seen in (halves, halves[::-1]):
        x, y = centred(*seen)
        rest = y - x @ by_hand(*fitted, ridge, prior).mT
        error += float((rest @ metric() * rest).sum())
    return error


@pytest.mark.parametrize("noise", [0.01, 1.0, 5.0, 30.0])
def test_the_ridge_is_the_one_with_which_each_half_foretells_the_other_best(noise):
    inputs, targets, _ = data(8, noise)
    prior = torch.zeros(TARGETS, INPUTS, dtype=torch.float64)
    weight, bias, _ = regression(inputs, targets, 4).solve(prior, metric())
    errors = [foretold(inputs, targets, ridge, prior) for ridge in RIDGES]
    best = RIDGES[errors.index(min(errors))]
    torch.testing.assert_close(weight, by_hand(inputs, targets, best, prior), rtol=1e-4, atol=1e-5)
    tokens = torch.tensor([1.0] + [WEIGHT] * (TOKENS - 1), dtype=torch.float64)[:, None]
    rest = targets.double() - inputs.double() @ weight.mT
    torch.testing.assert_close(bias, (tokens * rest).mean(0).sum(0) / tokens.sum(), rtol=1e-4, atol=1e-4)


def wrong_by(images: int, noise: float) -> tuple[float, float]:
    """Squared distance from the truth, the sum over draws: of the solution, and of plain least squares."""
    ours = plain = 0.0
    for seed in range(10):
        inputs, targets, truth = data(images, noise, seed)
        prior = truth + 0.1
        weight = regression(inputs, targets, 8).solve(prior, torch.eye(TARGETS, dtype=torch.float64)).weight
        ours += float((weight - truth).square().sum())
        plain += float((by_hand(inputs, targets, 0.0, prior) - truth).square().sum())
    return ours, plain


def test_noise_is_not_learnt_by_heart():
    ours, plain = wrong_by(images=8, noise=5.0)
    assert ours < 0.2 * plain


def test_what_the_images_know_for_sure_is_taken_from_them():
    ours, plain = wrong_by(images=200, noise=0.01)
    assert ours == pytest.approx(plain, rel=0.05)


def test_one_image_moves_little():
    inputs, targets, truth = data(1, 0.0)
    identity = torch.eye(TARGETS, dtype=torch.float64)
    weight = regression(inputs, targets, 1).solve(torch.zeros_like(truth), identity).weight
    assert 0 < weight.norm() < 0.05 * truth.norm()


@pytest.mark.parametrize("images_at_once", [1, 3, 8])
def test_parts_make_no_difference(images_at_once):
    inputs, targets, _ = data(8, 1.0)
    prior = torch.zeros(TARGETS, INPUTS, dtype=torch.float64)
    whole, parts = (regression(inputs, targets, size).solve(prior, metric())[0] for size in (8, images_at_once))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_halves_are_the_same_whoever_has_a_batch():
    inputs, targets, _ = data(15, 1.0)
    alone, *shares = (RegressionSums(INPUTS, TARGETS, 0.5) for _ in range(3))
    for number, batch in enumerate(zip(inputs.split(5), targets.split(5), strict=True)):
        alone.add(*batch, 1)
        shares[number % 2].add(*batch, 1)
    for half, (one, other) in zip(alone.halves, zip(*(share.halves for share in shares), strict=True), strict=True):
        torch.testing.assert_close(half.read.cross, one.read.cross + other.read.cross)


@given(st.lists(st.integers(0, 100), min_size=1, max_size=12, unique=True), st.data())
def test_descend_finds_the_bottom_of_a_valley(values, data):
    bottom = data.draw(st.integers(0, len(values) - 1))
    valley = sorted(values[: bottom + 1], reverse=True)
    valley += sorted(value + 101 for value in values[bottom + 1 :])
    valley[bottom] = -1
    assert descend(valley.__getitem__, data.draw(st.integers(0, len(values) - 1)), len(values)) == bottom


def test_the_error_of_normal_equations_is_that_of_the_data_but_for_a_constant():
    inputs, targets, truth = data(8, 1.0)
    x, y = centred(inputs, targets)
    equations = NormalEquations(x.mT @ x, x.mT @ y)
    difference = equations.error(truth) - equations.error(torch.zeros_like(truth))
    assert difference == pytest.approx(float((y - x @ truth.mT).square().sum() - y.square().sum()))
