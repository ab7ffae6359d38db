"""The MLP's low-rank bypass: best of its rank, exact for what the units cannot do, taken only where it pays."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_vit_lowrank.allocation import ErrorCurve
from hf_vit_lowrank.calibration import calibrate
from hf_vit_lowrank.candidates.block import UnitCosts
from hf_vit_lowrank.candidates.bypass import bypass_candidate
from hf_vit_lowrank.compress import build
from hf_vit_lowrank.evaluation import count_parameters
from hf_vit_lowrank.rank_plan import choose_ranks
from hf_vit_lowrank.recipe import CompressionRecipe

WIDTH, SIZE, KEPT = 9, 4, torch.tensor([0, 3, 4])


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, SIZE, generator=generator, dtype=torch.float64)
    up = torch.randn(WIDTH, SIZE, generator=generator, dtype=torch.float64)
    units = torch.nn.functional.gelu(inputs @ up.mT)
    both = torch.cat((units, inputs), 1)
    both = both - both.mean(0)
    weight = torch.randn(SIZE, WIDTH, generator=generator, dtype=torch.float64)
    root = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    return weight, both, root.mT @ root, root


def error(case, expand, reduce, down):
    weight, both, _, root = case
    units, inputs = both[:, :WIDTH], both[:, WIDTH:]
    rest = units @ weight.mT - units[:, KEPT] @ down.mT - inputs @ (expand @ reduce).mT
    return float((rest @ root.mT).square().sum())


def test_gains_are_what_a_bypass_takes_from_the_error(case):
    weight, both, metric, _ = case
    candidate = bypass_candidate(weight, KEPT, both.mT @ both, metric)
    errors = [error(case, *candidate.weights(rank)) for rank in range(SIZE + 1)]
    assert np.allclose(-np.diff(errors), candidate.gains.numpy(), rtol=1e-3, atol=1e-3 * errors[0])


def test_of_full_rank_it_is_the_regression_on_units_and_input(case):
    weight, both, metric, root = case
    candidate = bypass_candidate(weight, KEPT, both.mT @ both, metric)
    regressors = torch.cat((both[:, KEPT], both[:, WIDTH:]), 1)
    targets = both[:, :WIDTH] @ weight.mT
    rest = targets - regressors @ torch.linalg.lstsq(regressors, targets).solution
    assert error(case, *candidate.weights(SIZE)) == pytest.approx(float((rest @ root.mT).square().sum()), rel=1e-3)


def test_no_bypass_of_its_rank_is_better(case):
    weight, both, metric, _ = case
    candidate = bypass_candidate(weight, KEPT, both.mT @ both, metric)
    factors = [part.clone().requires_grad_(True) for part in candidate.weights(2)]
    best = error(case, *factors)
    optimizer = torch.optim.Adam(factors, 1e-3)
    _, root = case[2:]
    for _ in range(200):
        units, inputs = both[:, :WIDTH], both[:, WIDTH:]
        rest = units @ weight.mT - units[:, KEPT] @ factors[2].mT - inputs @ (factors[0] @ factors[1]).mT
        loss = (rest @ root.mT).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert error(case, *factors) >= 0.999 * best


@pytest.fixture(scope="module")
def calibrated(digits_model, digits_data):
    recipe = CompressionRecipe(reduction=0.8, samples=128)
    return calibrate(str(digits_model), str(digits_data.calibration), recipe, device="cpu")


@pytest.mark.parametrize("reduction", [0.6, 0.8])
def test_the_plan_with_bypasses_is_predicted_to_be_no_worse_and_counted_right(calibrated, reduction, monkeypatch):
    recipe = CompressionRecipe(reduction=reduction, samples=128, compensation="none")
    with_bypass = build(calibrated, recipe)
    monkeypatch.setattr("hf_vit_lowrank.rank_plan.BYPASS_ROUNDS", 0)
    without = build(calibrated, recipe)
    assert not any(without.report["plan"]["bypass_ranks"])
    assert with_bypass.report["predicted_loss"] <= without.report["predicted_loss"]
    assert count_parameters(with_bypass.model) == with_bypass.report["parameters"]


def test_some_bypass_pays_on_the_digits(calibrated):
    ranks = build(calibrated, CompressionRecipe(reduction=0.8, samples=128)).report["plan"]["bypass_ranks"]
    assert any(ranks)
    assert ranks[-1] == 0  # there only one token an image counts


def test_no_bypass_has_a_single_dimension():
    """Where 8-bit weights need two."""

    def bypasses(*errors):
        heads = SimpleNamespace(head_ranks=lambda size: [size])
        block = SimpleNamespace(
            query_key=heads,
            value_output=heads,
            curves=lambda *_: [ErrorCurve(np.array([4.0, 3.0, 2.0, 1.0, 0.0]), 10)] * 3,
            up_ranks=lambda *_: np.zeros(5, dtype=int),
            bypass_curve=lambda *_: ErrorCurve(np.array(errors), 4, smallest=0),
        )
        return choose_ranks([block], [UnitCosts(10, 10, 10, 4)], 65, 1.0, 1).bypass_ranks

    assert bypasses(3.0, 1.0, 0.99) == [0]
    assert bypasses(3.0, 1.0, 0.0) == [2]
