"""A recipe says one thing, refuses nonsense, and comes back from JSON as it was."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_vit_lowrank.errors import UserError
from hf_vit_lowrank.presets import PRESETS as BUILDERS
from hf_vit_lowrank.recipe import COMPENSATIONS, OURS, PRESETS, CompressionRecipe


@given(
    reduction=st.floats(0, 1, exclude_max=True),
    cost=st.sampled_from(["parameters", "flops"]),
    compensation=st.sampled_from(COMPENSATIONS),
    samples=st.integers(1, 10**6),
    seed=st.integers(0, 2**32 - 1),
)
def test_json_round_trip_keeps_the_recipe_and_its_fingerprint(**values):
    recipe = CompressionRecipe(**values)
    again = CompressionRecipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe
    assert again.fingerprint() == recipe.fingerprint()


def test_every_field_is_in_the_fingerprint():
    base = {"reduction": 0.5}
    changes = [{"reduction": 0.6}, {"seed": 1}, {"samples": 7}, {"cost": "flops"}, {"compensation": "none"}]
    prints = {CompressionRecipe(**{**base, **change}).fingerprint() for change in [{}, *changes]}
    assert len(prints) == len(changes) + 1


def test_every_preset_can_be_built_and_brings_its_own_compensation():
    assert (OURS, *BUILDERS) == PRESETS
    assert CompressionRecipe(reduction=0.5).compensation == "closed-form"
    assert all(CompressionRecipe(reduction=0.5, preset=name).compensation == "none" for name in BUILDERS)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"reduction": 0.5, "match": "a/b"},
        {"reduction": 0.5, "preset": "pca"},
        {"reduction": 0.5, "preset": "svd", "compensation": "closed-form"},
        {"reduction": 0.5, "preset": "svd", "cost": "flops"},
        {"reduction": 0.5, "labels": True},
        {"min_agreement": 0.9, "compensation": "gradient"},
        {"reduction": 0.5, "compensation": "distill", "distill_epochs": 0},
        {"reduction": 0.5, "compensation": "distill", "distill_lr": 0.0},
        {"reduction": 1.0},
        {"reduction": -0.1},
        {"reduction": float("nan")},
        {"max_parameters": 0},
        {"min_agreement": 0.0},
        {"min_agreement": 1.1},
        {"max_parameters": 10, "cost": "flops"},
        {"reduction": 0.5, "cost": "time"},
        {"reduction": 0.5, "compensation": "magic"},
        {"reduction": 0.5, "samples": 0},
        {"reduction": 0.5, "batch_size": 0},
        {"reduction": 0.5, "seed": -1},
        {"reduction": 0.5, "query_key_weight": float("inf")},
        {"reduction": 0.5, "rank_multiple": 0},
    ],
)
def test_nonsense_is_refused(values):
    with pytest.raises(UserError, match="not valid"):
        CompressionRecipe(**values)


def test_unknown_fields_are_refused_by_name():
    with pytest.raises(UserError, match="rank"):
        CompressionRecipe.from_dict({"reduction": 0.5, "rank": 3})
