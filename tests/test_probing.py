"""What sizes are worth, measured: against the whole model evaluated, and what becomes of the plan."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_vit_lowrank import probing, regression
from hf_vit_lowrank.budget import recipe_ranks
from hf_vit_lowrank.calibration import NOWHERE, calibrate
from hf_vit_lowrank.candidates.block import UnitCosts
from hf_vit_lowrank.compensation.closed_form import refit_block
from hf_vit_lowrank.compensation.drift import moved, tokens_computed
from hf_vit_lowrank.compress import build
from hf_vit_lowrank.divergence import stream_logits
from hf_vit_lowrank.embeddings import embedded_by
from hf_vit_lowrank.errors import UserError
from hf_vit_lowrank.probing import LARGEST_FACTOR, Weighed, curve_factors, probe_sizes
from hf_vit_lowrank.recipe import CompressionRecipe
from hf_vit_lowrank.surgery import shrink

RECIPE = CompressionRecipe(reduction=0.9, samples=64, rank_multiple=1, probe=True)


@pytest.fixture(scope="module")
def calibrated(digits_model, digits_data):
    """Behind the step that makes the stream narrower, which these small sizes begin with."""
    whole = calibrate(str(digits_model), str(digits_data.calibration), RECIPE, hold_back=0.25, device="cpu")
    return whole.narrower(RECIPE)


@pytest.fixture(scope="module")
def probed(calibrated):
    return build(calibrated, RECIPE)


def test_factors_by_hand():
    # The median is 4: roots of ratios to it, from a half to two; a size that harms counts as one that does nothing.
    assert curve_factors([[4.0, 1.0, 9.0], [0.1, 400.0, -3.0], [4.0, 6.25, 4.0]]) == [
        [1.0, 0.5, 1.5],
        [0.5, 2.0, 0.5],
        [1.0, 1.25, 1.0],
    ]
    assert curve_factors([[0.0, -1.0], [2.0, -1.0]]) == [[1.0, 1.0], [1.0, 1.0]]


@given(st.lists(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3), min_size=1, max_size=5))
def test_factors_are_within_bounds_and_rise_with_the_worth(worth):
    factors = curve_factors(worth)
    pairs = sorted(zip((ratio for own in worth for ratio in own), (f for own in factors for f in own), strict=True))
    assert all(1 / LARGEST_FACTOR <= factor <= LARGEST_FACTOR for _, factor in pairs)
    assert [factor for _, factor in pairs] == sorted(factor for _, factor in pairs)


def test_a_whole_mlp_is_probed_without_its_bypass(calibrated):
    plan = recipe_ranks(calibrated.dense, calibrated.candidates, calibrated.embedding, RECIPE)
    plan = replace(plan, bypass_ranks=[3] * len(plan.bypass_ranks))
    candidate, width = calibrated.candidates[1], calibrated.dense.model.config.intermediate_size
    assert probing._with_size(plan, 1, candidate, 2, width).bypass_ranks == [3, 0, *plan.bypass_ranks[2:]]
    assert probing._with_size(plan, 1, candidate, 2, width - 1).bypass_ranks == plan.bypass_ranks


@pytest.mark.usefixtures("plain_layout")
def test_worth_is_what_the_whole_model_loses(calibrated, monkeypatch):
    monkeypatch.setattr(probing, "STEP", 1 / 4)
    # Which of two ridges is better may hang on the last bits, which other batches change.
    monkeypatch.setattr(regression, "RIDGES", (0.1,))
    monkeypatch.setattr(regression, "START", 0)
    fitting = calibrated.fitting
    worth = probe_sizes(calibrated, RECIPE, NOWHERE)["worth"]
    dense, candidates = calibrated.dense.model, calibrated.candidates
    plan = recipe_ranks(calibrated.dense, candidates, calibrated.embedding, RECIPE)
    pieces = dense, candidates, calibrated.embedding, calibrated.statistics
    model = build(calibrated, replace(RECIPE, probe=False)).model
    expected = stream_logits(dense, fitting).log_softmax(-1)
    layer, step = 1, dense.config.hidden_size // 4
    divergences = []
    for change in (-step, step):
        widths = list(plan.mlp_widths)
        widths[layer] = min(max(widths[layer] + change, 1), dense.config.intermediate_size)
        other = shrink(*pieces, replace(plan, mlp_widths=widths))
        trial = copy.deepcopy(model)
        trial.vit.blocks[layer] = other.vit.blocks[layer]
        streams = [embedded_by(model, dense, fitting) for _ in range(2)]
        streams = [moved(one.vit.blocks[0], stream, None) for one, stream in zip((dense, model), streams, strict=True)]
        block, moments = trial.vit.blocks[layer], calibrated.statistics[layer]
        refit_block(
            dense.vit.blocks[layer],
            block,
            moments,
            *streams,
            tokens_computed(dense.config, layer),
            1,
            calibrated.images_at_once,
        )
        logits = stream_logits(trial, embedded_by(model, dense, fitting)).log_softmax(-1)
        divergences.append(float(((expected - logits) * expected.exp()).sum(-1).mean()))
        sizes = widths[layer]
        curve = candidates[layer].curves(UnitCosts(1, 1, 1, 1), RECIPE.query_key_weight, 1)[2].errors[sizes]
        divergences.append(float(curve))
    smaller, curve_smaller, larger, curve_larger = divergences
    assert worth[layer][2] == pytest.approx((smaller - larger) / (curve_smaller - curve_larger), rel=1e-3)


def test_factors_multiply_curves_and_nothing_else(calibrated):
    factors = [[2.0, 1.0, 0.5] for _ in calibrated.candidates]
    plain, weighed = calibrated.candidates[0], Weighed(calibrated.candidates, factors)[0]
    costs = UnitCosts(1, 2, 3, 4)
    for factor, one, other in zip(factors[0], plain.curves(costs, 4.0, 8), weighed.curves(costs, 4.0, 8), strict=True):
        assert other.errors == pytest.approx(factor * one.errors)
        assert (other.sizes, other.unit_cost) == (one.sizes, one.unit_cost)
    assert weighed.down_weight is plain.down_weight


def test_what_is_worth_more_gets_more(calibrated, monkeypatch):
    layers = len(calibrated.candidates)
    worth = [[1.0, 1.0, 1.0] for _ in range(layers)]
    worth[0] = [1.0, 0.01, 100.0]
    monkeypatch.setattr(probing._Prober, "measure", lambda *_: worth)
    plain, moved_to = (
        build(calibrated, replace(RECIPE, probe=probe, compensation="closed-form")).model.config
        for probe in (False, True)
    )
    assert moved_to.mlp_widths[0] > plain.mlp_widths[0]
    assert sum(moved_to.value_output_ranks[0]) <= sum(plain.value_output_ranks[0])


def test_ranks_are_chosen_again_within_the_limit_and_told(calibrated, probed):
    plain = build(calibrated, replace(RECIPE, probe=False))
    limit = int(0.1 * calibrated.dense.parameters)
    assert probed.report["parameters"] <= limit
    assert probed.report["plan"] != plain.report["plan"]
    assert "probes" not in plain.report
    layers = len(calibrated.candidates)
    assert [len(own) for own in probed.report["probes"]["worth"]] == [3] * layers
    assert probed.report["probes"]["factors"] == curve_factors(probed.report["probes"]["worth"])


@pytest.mark.parametrize("fields", [{"compensation": "none"}, {"native": True}, {"preset": "svd"}])
def test_what_cannot_be_probed_is_refused(fields):
    with pytest.raises(UserError, match="probe goes with preset"):
        CompressionRecipe(reduction=0.5, probe=True, **fields)
