"""A recipe says one thing, refuses nonsense, and comes back from JSON as it was."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hf_vit_lowrank.errors import UserError
from hf_vit_lowrank.presets import PRESETS as BUILDERS
from hf_vit_lowrank.recipe import COMPENSATIONS, OURS, PRESETS, CompressionRecipe, read_recipe_file


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
    assert CompressionRecipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe


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


def test_a_recipe_file_may_write_a_number_by_its_exponent(tmp_path):
    (tmp_path / "recipe.yaml").write_text("reduction: 5e-1\ndistill_lr: 1e-4\ncompensation: distill\n")
    recipe = CompressionRecipe.from_dict(read_recipe_file(tmp_path / "recipe.yaml"))
    assert (recipe.reduction, recipe.distill_lr, recipe.compensation) == (0.5, 1e-4, "distill")


BOMB = "a: &a [x, x, x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}, *{old}, *{old}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("reduction: lots", "reduction must be a number, not 'lots'"),
        ("reduction: 0.5\nsamples: 12.5", "samples must be a whole number, not 12.5"),
        ("reduction: 0.5\nsamples: true", "samples must be a whole number, not True"),
        ("reduction: 0.5\nlabels: 1", "labels must be true or false, not 1"),
        ("reduction: 0.5\nwidth: 3", "unknown field width"),
        ("reduction: [0.5]", "reduction must be a number, not a list"),
        ("reduction: 0.5\nmatch: org/model", "exactly one"),
        (BOMB, "unknown field a, b"),
        (BOMB.replace("j:", "reduction:"), "unknown field"),
    ],
)
def test_a_recipe_file_with_a_wrong_field_names_it(text, message, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        CompressionRecipe.from_dict(read_recipe_file(tmp_path / "recipe.yaml"))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0.6",
        "- 0.6",
        "reduction: [",
        "!!python/object/apply:os.system ['touch evil']",
        "reduction: 0.5\nreduction: 0.6",
    ],
)
def test_what_is_no_recipe_file_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        read_recipe_file(tmp_path / "recipe.yaml")
    assert not (tmp_path / "evil").exists()


def test_a_recipe_file_that_is_not_there_or_not_text_is_refused(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name in ("missing.yaml", "binary.yaml", "."):
        with pytest.raises(UserError, match="cannot be read"):
            read_recipe_file(tmp_path / name)


@pytest.mark.parametrize(
    "path", ["/etc", "../other", "a/../../b", "~/model", "./model", "a/b/c", "C:\\model", "..", "a/..b"]
)
def test_a_recipe_file_cannot_name_a_path(path, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"match": path}))
    with pytest.raises(UserError, match="only a model of the hub"):
        read_recipe_file(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("name", ["facebook/deit-small-patch16-224", "gpt2", "org/model.v1"])
def test_a_recipe_file_may_name_a_model_of_the_hub(name, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"match: {name}")
    assert read_recipe_file(tmp_path / "recipe.yaml") == {"match": name}
