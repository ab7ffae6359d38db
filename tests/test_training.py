"""Compensation by training, on the digits model: it starts from the closed form and never ends below it."""

from __future__ import annotations

import copy
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import ViTImageProcessor

from hf_vit_lowrank.augmentation import KEPT_SIZE, RandomViews
from hf_vit_lowrank.calibration import CPU_IMAGES_AT_ONCE, calibrate
from hf_vit_lowrank.checkpoint import load_checkpoint
from hf_vit_lowrank.compensation import steps
from hf_vit_lowrank.compensation.drift import DRIFT_SEEN
from hf_vit_lowrank.compensation.gradient import (
    LARGEST_SHARE,
    _Blends,
    _descend,
    _Error,
    _Examples,
    compensate_gradient,
)
from hf_vit_lowrank.compress import build
from hf_vit_lowrank.divergence import held_back_confidence, held_back_divergence
from hf_vit_lowrank.errors import UserError
from hf_vit_lowrank.images import LabelledImage, open_images
from hf_vit_lowrank.recipe import CompressionRecipe
from hf_vit_lowrank.remote.modeling_lowrank_vit import LowRankViTForImageClassification
from hf_vit_lowrank.run_folder import RunFolder
from hf_vit_lowrank.tables import show_compression

RECIPE = CompressionRecipe(reduction=0.95, samples=160, compensation="gradient", rank_multiple=1)
DISTILL = replace(RECIPE, compensation="distill", distill_epochs=15, distill_lr=1e-3)
SHORT = replace(DISTILL, distill_epochs=3)


@pytest.fixture(scope="module")
def calibrated(digits_model, digits_data):
    return calibrate(str(digits_model), str(digits_data.calibration), RECIPE, hold_back=0.25, device="cpu")


@pytest.fixture(scope="module")
def closed_form(calibrated):
    """Of the plan that training starts from, which has no bypasses and the whole stream."""
    with patch.multiple("hf_vit_lowrank.rank_plan", BYPASS_ROUNDS=0, STREAM_FROM=1.0):
        return build(calibrated, replace(RECIPE, compensation="closed-form"))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """What `trained` leaves of its run: the blocks, from which a distillation can go on."""
    return tmp_path_factory.mktemp("training") / "run"


@pytest.fixture(scope="module")
def trained(calibrated, run_folder):
    return build(calibrated, RECIPE, run=RunFolder(run_folder))


@pytest.fixture(scope="module")
def distilled_by(calibrated, trained, run_folder, tmp_path_factory):
    """Distils by a recipe behind `trained`, whose blocks need not be trained again."""

    def distil(recipe):
        copied = shutil.copytree(run_folder, tmp_path_factory.mktemp("distillation") / "run")
        return build(calibrated, recipe, run=RunFolder(copied))

    return distil


@pytest.fixture(scope="module")
def distilled(distilled_by):
    return distilled_by(DISTILL)


@pytest.fixture(scope="module")
def shortly_distilled(distilled_by):
    return distilled_by(SHORT)


def test_training_block_by_block_brings_the_model_nearer_to_the_dense_one(calibrated, closed_form, trained):
    before, after = (held_back_divergence(calibrated, one.model) for one in (closed_form, trained))
    assert after < before
    report = trained.report["gradient"]
    assert after < report["before"] <= before  # with the confidence that the model as it was refitted should have
    assert report["after"] == pytest.approx(after, rel=1e-4)
    assert all(block["after"] < block["before"] for block in report["blocks"] if block["kept"])
    assert not any(trained.model.config.bypass_ranks)


def test_distillation_brings_it_nearer_still(calibrated, trained, distilled):
    record = distilled.report["distillation"]
    before, after = (held_back_divergence(calibrated, one.model) for one in (trained, distilled))
    assert record["kept"]
    assert after < before
    assert record["before"] == pytest.approx(before, rel=1e-4)
    assert record["after"] == pytest.approx(after, rel=1e-4)


def test_the_same_seed_gives_the_same_bits(distilled_by, shortly_distilled):
    again = distilled_by(SHORT)
    state = again.model.state_dict()
    assert again.report["distillation"] == shortly_distilled.report["distillation"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in shortly_distilled.model.state_dict().items())


def test_a_distilled_model_is_saved_as_it_is(shortly_distilled, tmp_path):
    shortly_distilled.save_pretrained(tmp_path / "out")
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    saved = load_checkpoint(tmp_path / "out")[0]
    with torch.no_grad():
        assert torch.allclose(saved(pixels).logits, shortly_distilled.model(pixels).logits, atol=1e-6)


@pytest.mark.usefixtures("plain_layout")
def test_a_block_that_training_makes_worse_stays_as_it_was(calibrated, monkeypatch):
    monkeypatch.setattr("hf_vit_lowrank.rank_plan.STREAM_FROM", 1.0)
    monkeypatch.setattr("hf_vit_lowrank.compensation.gradient.LEARNING_RATE", 10.0)
    model = build(calibrated, replace(RECIPE, compensation="none")).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    records = compensate_gradient(
        *(calibrated.dense.model, model, calibrated.statistics, torch.cat(calibrated.fitting), calibrated.held_back),
        images=sum(map(len, calibrated.fitting)),
        batch_size=RECIPE.batch_size,
        size=CPU_IMAGES_AT_ONCE,
        refit=False,
        seed=0,
        run=RunFolder(),
    )
    assert not any(record.kept for record in records)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_step_is_the_same_however_many_images_are_worked_on_at_once(calibrated):
    """In float64: Adam makes whole steps of gradients that are nothing but rounding."""
    inputs = torch.cat(calibrated.fitting)[:16]
    with torch.no_grad():
        targets = calibrated.dense.model.vit.blocks[0](inputs)[0]
    error = _Error(calibrated.statistics[0], targets, 1, torch.device("cpu"), size=8)
    error.root, inputs, targets = error.root.double(), inputs.double(), targets.double()
    block = copy.deepcopy(calibrated.dense.model.vit.blocks[1]).double().requires_grad_(True)
    whole, part = (copy.deepcopy(block) for _ in range(2))
    for block, size in ((whole, 8), (part, 3)):
        examples = _Examples(inputs, inputs, targets, num_read=1, seed=0)
        _descend(block, error, examples, seed=0, batch_size=8, size=size)
    for one, other in zip(whole.parameters(), part.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sureness", [0.5, 1.0, 1.5])
def test_the_confidence_of_the_dense_model_is_found_again(calibrated, sureness):
    model = copy.deepcopy(calibrated.dense.model)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.mul_(sureness)
    assert held_back_confidence(calibrated, model) == pytest.approx(1 / sureness, rel=1e-3)


def test_a_trained_model_cannot_be_nearer_by_confidence_alone(calibrated, trained):
    assert held_back_confidence(calibrated, trained.model) == pytest.approx(1.0, rel=1e-3)
    assert trained.report["gradient"]["confidence"] != 1.0


def test_few_held_back_images_do_not_tell_how_sure_a_model_is(calibrated, trained):
    few = replace(calibrated, held_back=[calibrated.held_back[0][:19]], expected=calibrated.expected[:19])
    assert steps._match_confidence(few, copy.deepcopy(trained.model)) == 1.0


@pytest.mark.usefixtures("plain_layout")
def test_views_are_trained_on_but_not_refitted_on(calibrated, monkeypatch):
    """Two views of one image in the two halves of the images would make its noise look like knowledge."""
    monkeypatch.setattr("hf_vit_lowrank.rank_plan.STREAM_FROM", 1.0)
    monkeypatch.setattr("hf_vit_lowrank.compensation.gradient.LEARNING_RATE", 0.0)
    images = torch.cat(calibrated.fitting)
    states = []
    for views in (images[:0], torch.randn_like(images)):
        model = build(calibrated, replace(RECIPE, compensation="none")).model
        inputs = torch.cat((images, views))
        compensate_gradient(
            *(calibrated.dense.model, model, calibrated.statistics, inputs, calibrated.held_back),
            images=len(images),
            batch_size=RECIPE.batch_size,
            size=CPU_IMAGES_AT_ONCE,
            refit=True,
            seed=0,
            run=RunFolder(),
        )
        states.append(model.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_only_the_last_block_is_trained_on_blends(calibrated, trained, monkeypatch):
    monkeypatch.setattr("hf_vit_lowrank.compensation.gradient.LARGEST_SHARE", 0.0)
    without = build(calibrated, RECIPE).model.vit.blocks
    *others, last = [
        all(torch.equal(tensor, one.state_dict()[name]) for name, tensor in other.state_dict().items())
        for one, other in zip(without, trained.model.vit.blocks, strict=True)
    ]
    assert all(others)
    assert not last


@torch.no_grad()
def test_a_blend_is_mostly_its_own_image_and_its_target_exact(calibrated):
    source, chosen = calibrated.dense.model.vit.blocks[-1], torch.arange(8)
    inputs = torch.eye(8, source.attention.query.in_features)[:, None].repeat(1, 3, 1)
    seen, targets = _Blends(inputs, 2 * inputs, source=source, num_read=1, seed=0).batch(chosen, torch.device("cpu"))
    blended = seen / (2 - DRIFT_SEEN)
    torch.testing.assert_close(targets, source(2 * blended, 1)[0])
    torch.testing.assert_close(blended.sum(-1), torch.ones(8, 3))
    own = blended[chosen, :, chosen]
    assert own.min() >= 1 - LARGEST_SHARE
    assert own.max() > own.min()


def test_a_block_is_trained_on_a_part_of_the_drift_and_of_the_tokens(monkeypatch):
    monkeypatch.setattr("hf_vit_lowrank.compensation.gradient.SAMPLED", 3)
    inputs, dense_inputs, targets = torch.rand(3, 8, 7, 4)
    examples = _Examples(inputs, dense_inputs, targets, num_read=2, seed=0)
    chosen = torch.tensor([5, 2])
    seen, aimed_at = examples.batch(chosen, torch.device("cpu"))
    assert aimed_at.shape == (2, 5, 4)
    order = [int((targets[5] == token).all(-1).nonzero()) for token in aimed_at[0]]
    assert order[:2] == [0, 1]
    assert len(set(order)) == 5
    expected = dense_inputs.lerp(inputs, DRIFT_SEEN)[chosen]
    torch.testing.assert_close(seen[:, :5], expected[:, order])
    torch.testing.assert_close(seen.sum(1), expected.sum(1))  # attention reads the others, too
    assert not torch.equal(examples.batch(chosen, torch.device("cpu"))[1], aimed_at)


def test_some_tokens_stand_for_all(calibrated):
    """The errors of halves of the tokens that the classifier does not read have the error of all as their mean."""
    targets = torch.cat(calibrated.fitting)[:16]
    error = _Error(calibrated.statistics[0], targets, 1, torch.device("cpu"), size=8)
    outputs, read, others = targets + torch.randn_like(targets), torch.tensor([0]), torch.arange(1, targets.shape[1])
    halves = [torch.cat((read, half)) for half in others.split(len(others) // 2)]
    errors = [error(outputs[:, half], targets[:, half]) for half in halves]
    torch.testing.assert_close(torch.stack(errors).mean(), error(outputs, targets))


def test_distillation_that_only_harms_leaves_the_start(distilled_by, trained):
    result = distilled_by(replace(DISTILL, distill_epochs=1, distill_lr=100.0))
    assert (result.report["distillation"]["kept"], result.report["distillation"]["share"]) == (False, 0.0)
    start = trained.model.state_dict()
    assert all(torch.equal(tensor, start[name]) for name, tensor in result.model.state_dict().items())


@pytest.mark.parametrize(("nearest", "expected"), [(0.6, 0.5), (2.0, 1.0), (-1.0, 0.25)])
def test_of_the_way_to_distilled_weights_the_best_share_is_gone(nearest, expected, monkeypatch):
    start, end = nn.Linear(3, 2), nn.Linear(3, 2)
    before, after = (copy.deepcopy(one.state_dict()) for one in (start, end))

    def divergence(_, model):
        share = ((model.weight - before["weight"]) / (after["weight"] - before["weight"])).mean().item()
        return math.nan if share > 0.9 and nearest < 1 else abs(share - nearest)

    monkeypatch.setattr(steps, "held_back_divergence", divergence)
    share, distance = steps._nearest_on_the_way(None, end, before)
    assert (share, distance) == (expected, pytest.approx(abs(expected - nearest), abs=1e-5))
    torch.testing.assert_close(end.weight.detach(), before["weight"].lerp(after["weight"], expected))


def test_distillation_that_ends_in_no_numbers_is_still_a_record(distilled_by, caplog):
    result = distilled_by(replace(DISTILL, distill_epochs=1, distill_lr=1e9))
    assert json.loads(json.dumps(result.report["distillation"], allow_nan=False))["curve"][-1][1] is None
    assert result.report["distillation"]["kept"] is False
    assert "its rate 1e+09 is too high" in caplog.text
    show_compression(result.report, Path("out"))


def test_labels_are_learnt_from(distilled_by, shortly_distilled):
    labelled = distilled_by(replace(SHORT, labels=True))
    assert labelled.report["distillation"]["curve"][-1] != shortly_distilled.report["distillation"]["curve"][-1]


def test_labels_that_are_missing_are_named(digits_model, digits_data, tmp_path):
    from datasets import load_dataset

    data = load_dataset("parquet", data_files=str(digits_data.calibration), split="train").select(range(20))
    data.remove_columns("label").to_parquet(tmp_path / "bare.parquet")
    recipe = replace(DISTILL, labels=True, samples=20)
    with pytest.raises(UserError, match="no label column to learn from"):
        calibrate(str(digits_model), str(tmp_path / "bare.parquet"), recipe, hold_back=0.25, device="cpu")
    some = [label if place else -1 for place, label in enumerate(data["label"])]
    data.remove_columns("label").add_column("label", some).to_parquet(tmp_path / "some.parquet")
    calibrated = calibrate(str(digits_model), str(tmp_path / "some.parquet"), recipe, hold_back=0.25, device="cpu")
    with pytest.raises(UserError, match="no label for 1 of its images"):
        build(calibrated, recipe)


@pytest.fixture
def views(digits_data, calibrated):
    images = open_images(str(digits_data.calibration), samples=4, seed=0)
    return RandomViews(images, calibrated.dense.image_processor, (16, 16), torch.device("cpu"))


def test_views_are_crops_of_the_image_and_follow_their_seed(views):
    assert len(views) == 4
    assert max(min(image.shape[1:]) for image in views.kept) <= KEPT_SIZE * 16
    first, again = (views.batch([0, 1], torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (2, 3, 16, 16)
    assert not torch.equal(first, views.batch([0, 1], torch.Generator().manual_seed(4)))
    whole = views.plain([0, 1])
    assert first.min() >= whole.min() - 0.5  # bicubic overshoots a little
    assert first.max() <= whole.max() + 0.5


def test_plain_views_are_what_the_processor_makes(views, digits_data, calibrated):
    images = [item.image for item in open_images(str(digits_data.calibration), samples=4, seed=0)]
    prepared = calibrated.dense.image_processor(images=images, return_tensors="pt")["pixel_values"]
    assert torch.allclose(views.plain(range(4)), prepared, atol=1e-6)


def test_a_grayscale_model_gets_grayscale_views():
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8))
    views = RandomViews([LabelledImage(image, None, 0)], processor, (8, 8), torch.device("cpu"))
    assert views.batch([0, 0], torch.Generator().manual_seed(0)).shape == (2, 1, 8, 8)
    assert torch.allclose(
        views.plain([0]), processor(images=[image.convert("L")], return_tensors="pt")["pixel_values"], atol=1e-6
    )


def test_distillation_goes_on_with_parts_of_a_batch_where_memory_is_short(
    distilled_by, shortly_distilled, monkeypatch, caplog
):
    forward = LowRankViTForImageClassification.forward

    def short_of_memory(self, pixel_values, **options):
        if self.training and len(pixel_values) > 8:
            raise MemoryError
        return forward(self, pixel_values, **options)

    monkeypatch.setattr(LowRankViTForImageClassification, "forward", short_of_memory)
    result = distilled_by(SHORT)
    assert "once more with 8" in caplog.text
    curves = [dict(one.report["distillation"]["curve"]) for one in (result, shortly_distilled)]
    assert curves[0] == pytest.approx(curves[1], rel=0.1)  # bfloat16


def test_gradient_checkpointing_changes_nothing_but_memory(distilled_by, shortly_distilled):
    result = distilled_by(replace(SHORT, gradient_checkpointing=True))
    assert result.report["distillation"] == shortly_distilled.report["distillation"]
