"""An up weight of lower rank: the best of all, at the rank that is worth what it costs, and in a whole model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pivoting import random_matrix

from hf_vit_lowrank import rank_plan
from hf_vit_lowrank.allocation import ErrorCurve, hull_slopes
from hf_vit_lowrank.calibration import calibrate
from hf_vit_lowrank.candidates.block import FREE, UP_RANK_WEIGHT, UnitCosts
from hf_vit_lowrank.candidates.up_rank import best_ranks, input_metric, low_rank, rank_errors
from hf_vit_lowrank.compensation import gradient
from hf_vit_lowrank.compress import build
from hf_vit_lowrank.evaluation import count_parameters
from hf_vit_lowrank.linalg import square_root
from hf_vit_lowrank.recipe import CompressionRecipe
from hf_vit_lowrank.remote.modeling_lowrank_vit import InterpolativeLinear
from hf_vit_lowrank.statistics import Moments
from hf_vit_lowrank.surgery import keep_units

WIDTH, SIZE = 9, 6


def random_moment(size: int, seed: int) -> torch.Tensor:
    factor = random_matrix(size, size, seed=seed)
    return factor @ factor.mT


def error(lost: torch.Tensor, covariance: torch.Tensor, metric: torch.Tensor) -> float:
    return float(torch.trace(metric @ lost @ covariance @ lost.mT))


def whole(order: torch.Tensor, read: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    weight = torch.empty(len(order), read.shape[1], dtype=torch.float64)
    weight[order] = torch.cat((read, others @ read))
    return weight


@given(seed=st.integers(0, 10_000), rank=st.integers(1, SIZE))
@settings(max_examples=25, deadline=None)
def test_the_error_of_a_rank_is_reached_and_not_undercut(seed, rank):
    weight, covariance = random_matrix(WIDTH, SIZE, seed=seed), random_moment(SIZE, seed + 1)
    metric = random_moment(WIDTH, seed + 2)
    own = weight.mT @ metric @ weight
    errors, parts = rank_errors(covariance, own), low_rank(weight, covariance, own, rank)
    assert sorted(parts[0].tolist()) == list(range(WIDTH))
    assert [tuple(part.shape) for part in parts[1:]] == [(rank, SIZE), (WIDTH - rank, rank)]
    reached = error(weight - whole(*parts), covariance, metric)
    assert reached == pytest.approx(float(errors[rank]), rel=1e-5, abs=1e-7 * float(errors[0]))
    for step in (1e-3, 1e-1):
        moved = [part + step * random_matrix(*part.shape, seed=seed + 3) for part in parts[1:]]
        assert error(weight - whole(parts[0], *moved), covariance, metric) >= float(errors[rank]) * (1 - 1e-9)
    assert errors[0] == pytest.approx(error(weight, covariance, metric))


def test_dead_units_and_inputs_that_never_vary_are_no_obstacle():
    weight, covariance, metric = random_matrix(WIDTH, SIZE), random_moment(SIZE, 1), random_moment(WIDTH, 2)
    weight[6:] = 0.0
    covariance[:2], covariance[:, :2] = 0.0, 0.0
    parts = low_rank(weight, covariance, weight.mT @ metric @ weight, 4)
    assert all(part.isfinite().all() for part in parts)
    assert error(weight - whole(*parts), covariance, metric) < 1e-9 * error(weight, covariance, metric)


def test_what_an_error_of_the_inputs_costs():
    """Of slopes that are independent of one another: the mean over all combinations of two values each."""
    up, down, metric = random_matrix(3, 2, seed=2), random_matrix(2, 3), random_moment(2, 1)
    values = torch.tensor([[0.0, 1.0], [0.5, 1.0], [-0.1, 0.3]], dtype=torch.float64)
    slopes = Moments(2.0, values.sum(1, keepdim=True), values.square().sum(1)[:, None, None])
    expected = torch.zeros(2, 2, dtype=torch.float64)
    for combination in torch.cartesian_prod(*values):
        jacobian = (down * combination) @ up
        expected += jacobian.mT @ metric @ jacobian / 8
    torch.testing.assert_close(input_metric(up, down, metric, slopes), expected)


def test_slopes_of_a_hull_by_hand():
    # From 1 on: the hull goes 1, 2, 4, since 3 lies above the line from 2 to 4.
    curve = ErrorCurve(np.array([9.0, 6.0, 2.0, 1.9, 0.0]), 2)
    assert hull_slopes(curve).tolist() == [2.0, 2.0, 0.5, 0.5, 0.0]


@given(
    errors=st.lists(st.floats(0, 10), min_size=2, max_size=7),
    slopes=st.lists(st.floats(0, 1), min_size=1, max_size=12),
    multiple=st.integers(1, 3),
)
def test_the_rank_of_each_width_by_trying_all(errors, slopes, multiple):
    errors = [*sorted(errors, reverse=True)[:-1], 0.0]
    size = len(errors) - 1
    ranks = best_ranks(np.array(errors), np.array(slopes), 1, size, multiple)
    for width, (slope, rank) in enumerate(zip(slopes, ranks.tolist(), strict=True)):
        costs = {0: slope * width * size}
        for other in range(multiple, size + 1, multiple):
            if 2 <= other <= width - 2:
                costs[other] = errors[other] + slope * other * (width + size - other)
        assert rank in costs
        assert costs[rank] == pytest.approx(min(costs.values()))


def test_a_weight_that_must_stay_whole_does():
    assert not best_ranks(np.array([1.0, 0.5, 0.0]), np.ones(9), 0, 2, 1).any()


@torch.no_grad()
def test_an_mlp_without_curves_loses_what_was_predicted():
    """With an identity in place of the activation the prediction is exact."""
    plan = {"mlp_widths": [12, 12], "up_ranks": [5, 0], "hidden_act": "linear", "intermediate_size": 16}
    dense = random_model(0.4, hidden_size=8, num_attention_heads=2, **{**plan, "mlp_widths": None, "up_ranks": None})
    small = random_model(0.4, hidden_size=8, num_attention_heads=2, **plan)
    mlp, source = small.vit.blocks[0].mlp, dense.vit.blocks[0].mlp
    inputs, metric = random_matrix(200, 8).float(), random_moment(8, 1)
    seen = Moments.zeros(24)
    seen.add(torch.cat((source.up(inputs), inputs), -1))
    slopes = Moments(200.0, 200 * torch.ones(16, 1).double(), 200 * torch.ones(16, 1, 1).double())
    kept = torch.tensor([0, 1, 2, 4, 5, 7, 8, 9, 11, 12, 14, 15])
    down, bias = source.down.weight, source.down.bias
    keep_units(small.vit.blocks[0], dense.vit.blocks[0], kept, down, bias, seen, slopes, metric)
    # Twelve units of an identity tell eight inputs apart, so that all of the error is the rank's.
    lost = (source(inputs) - mlp(inputs)).double()
    through = (source.down.weight @ source.up.weight).double()
    predicted = rank_errors(seen.part(slice(16, None)).covariance(), through.mT @ metric @ through)
    assert float((lost @ square_root(metric)[0]).square().sum()) == pytest.approx(float(predicted[5]), rel=1e-3)


@pytest.fixture(scope="module")
def calibrated(digits_model, digits_data):
    recipe = CompressionRecipe(reduction=0.5, samples=128)
    return calibrate(str(digits_model), str(digits_data.calibration), recipe, device="cpu")


@pytest.mark.parametrize("cost", ["parameters", "flops"])
def test_some_up_weights_of_lower_rank_pay_on_the_digits(calibrated, cost, monkeypatch):
    recipe = CompressionRecipe(reduction=0.5, samples=128, compensation="none", cost=cost)
    result = build(calibrated, recipe)
    ranks = result.report["plan"]["up_ranks"]
    assert any(ranks)
    assert ranks[-1] == 0  # there only one token an image counts
    assert [type(block.mlp.up) is InterpolativeLinear for block in result.model.vit.blocks] == [
        rank > 0 for rank in ranks
    ]
    assert count_parameters(result.model) == result.report["parameters"]
    with monkeypatch.context() as patched:
        costs = rank_plan.model_costs
        patched.setattr(
            rank_plan,
            "model_costs",
            lambda *rest: ([replace(unit, entry=0) for unit in costs(*rest)[0]], costs(*rest)[1]),
        )
        without = build(calibrated, recipe)
    assert not any(without.report["plan"]["up_ranks"])
    assert result.report["predicted_loss"] < without.report["predicted_loss"]


def test_training_moves_rows_and_the_map_that_makes_others_of_them(digits_model, digits_data, monkeypatch):
    recipe = CompressionRecipe(reduction=0.85, samples=96, compensation="gradient")
    calibrated = calibrate(str(digits_model), str(digits_data.calibration), recipe, hold_back=0.25, device="cpu")
    monkeypatch.setattr(gradient, "EPOCHS", 2)
    models = []
    for rate in (0.0, gradient.LEARNING_RATE):
        monkeypatch.setattr(gradient, "LEARNING_RATE", rate)
        result = build(calibrated, recipe)
        models.append(result.model)
    assert result.report["gradient"]["kept"]
    kept = [block["kept"] for block in result.report["gradient"]["blocks"]]
    ups = [[block.mlp.up for block in model.vit.blocks] for model in models]
    moved = [
        not torch.equal(before, after)
        for one, other, trained in zip(*ups, kept, strict=True)
        if trained and isinstance(one, InterpolativeLinear)
        for before, after in ((one.read.weight, other.read.weight), (one.rest.weight, other.rest.weight))
    ]
    assert moved
    assert all(moved)


def test_a_curve_says_what_a_width_costs_with_its_rank(calibrated):
    block, costs = calibrated.candidates[0], UnitCosts(4, 4, 129, 128, entry=1)
    width, ranks = block.curves(costs, 4.0, 8)[2], block.up_ranks(costs, 8)
    plain = block.curves(replace(costs, entry=0), 4.0, 8)[2]
    assert any(ranks)
    assert not block.up_ranks(FREE, 8).any()
    for size, rank in enumerate(ranks.tolist()):
        inputs = len(block.down_weight)
        entries = rank * inputs + rank * (size - rank) if rank else size * inputs
        assert width.cost(size) == entries + size * (129 - inputs)
        expected = 0.5 * UP_RANK_WEIGHT * float(block.rank_errors[rank]) if rank else 0.0
        assert width.errors[size] - plain.errors[size] == pytest.approx(expected, abs=1e-9)
