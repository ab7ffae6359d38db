"""The whole path on the digits model, and on the real DeiT-tiny where it is at hand."""

from __future__ import annotations

import importlib
import json
import time
from dataclasses import replace

import pytest
import torch
from datasets import ClassLabel, load_dataset

import hf_vit_lowrank
from hf_vit_lowrank.budget import recipe_ranks
from hf_vit_lowrank.calibration import calibrate, training_share
from hf_vit_lowrank.checkpoint import load_checkpoint
from hf_vit_lowrank.compensation import drift
from hf_vit_lowrank.compensation.closed_form import _refit_attention, _refit_mlp, compensate_closed_form
from hf_vit_lowrank.compress import build, compress, plan
from hf_vit_lowrank.divergence import held_back_agreement, held_back_divergence
from hf_vit_lowrank.embeddings import embedded_by
from hf_vit_lowrank.errors import UserError
from hf_vit_lowrank.evaluation import count_parameters, evaluate_classifier
from hf_vit_lowrank.expected_time import expected_seconds
from hf_vit_lowrank.images import open_images
from hf_vit_lowrank.plan_costs import plan_cost
from hf_vit_lowrank.presets import PRESETS
from hf_vit_lowrank.recipe import CompressionRecipe
from hf_vit_lowrank.run_folder import RunFolder
from hf_vit_lowrank.sweep import sweep

RECIPE = CompressionRecipe(reduction=0.5, samples=256)


@pytest.fixture(scope="module")
def calibrated(digits_model, digits_data):
    return calibrate(str(digits_model), str(digits_data.calibration), RECIPE, hold_back=0.2, device="cpu")


@pytest.fixture(scope="module")
def halved(calibrated):
    return build(calibrated, RECIPE)


def top1(model, result, data):
    return evaluate_classifier(model, result.image_processor, open_images(str(data), seed=None), device="cpu").top1


@pytest.mark.parametrize("reduction", [0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("cost", ["parameters", "flops"])
def test_budget_is_kept_and_used(calibrated, reduction, cost):
    recipe = replace(RECIPE, reduction=reduction, cost=cost, compensation="none")
    ranks = build(calibrated, recipe).model.config
    whole = calibrated.dense.parameters if cost == "parameters" else plan_cost(calibrated.dense.model.config, "flops")
    used = plan_cost(ranks, cost) / ((1 - reduction) * whole)
    # One unit is a larger share of this small model than of any real one.
    assert 0.99 <= used <= 1.0


def test_the_last_mlp_is_weighed_by_what_is_removed(calibrated):
    recipes = [replace(RECIPE, reduction=reduction) for reduction in (0.1, 0.6)]
    plans = [recipe_ranks(calibrated.dense, calibrated.candidates, calibrated.embedding, recipe) for recipe in recipes]
    assert [plan.last_width for plan in plans] == pytest.approx([1.55, 0.2], abs=0.02)


def test_inner_sizes_of_a_layer_are_multiples_or_whole(calibrated, halved):
    result = build(calibrated, replace(RECIPE, compensation="none", rank_multiple=16))
    config, dense = result.model.config, calibrated.dense.model.config
    layers = zip(config.query_key_ranks, config.value_output_ranks, config.mlp_widths, strict=True)
    for query_key, value_output, width in layers:
        assert sum(query_key) % 16 == sum(value_output) % 16 == 0
        assert width % 16 == 0 or width == dense.intermediate_size
    assert any(width % 16 for width in halved.model.config.mlp_widths)


def test_the_parameters_reported_are_those_stored(halved):
    assert halved.report["parameters"] == count_parameters(halved.model)
    assert halved.report["reduction"] >= 0.5


@pytest.mark.usefixtures("plain_layout")
def test_no_reduction_is_the_dense_model(calibrated):
    result = build(calibrated, replace(RECIPE, reduction=0.0, compensation="none"))
    batch = calibrated.held_back[0]
    for small, dense in zip(result.model.vit.blocks, calibrated.dense.model.vit.blocks, strict=True):
        assert torch.allclose(small(batch)[0], dense(batch)[0], atol=1e-5)
    assert held_back_agreement(calibrated, result.model) == 1.0


@pytest.mark.usefixtures("plain_layout")
def test_compensation_brings_the_stream_nearer(calibrated):
    smaller = replace(RECIPE, reduction=0.97, rank_multiple=1)
    calibrated, drifts = calibrated.narrower(smaller), []
    for recipe in (replace(smaller, compensation="none"), smaller):
        model = build(calibrated, recipe).model
        dense_stream = torch.cat(calibrated.held_back)
        (small_stream,) = embedded_by(model, calibrated.dense.model, [dense_stream])
        distances = []
        for dense, small in zip(calibrated.dense.model.vit.blocks, model.vit.blocks, strict=True):
            dense_stream, small_stream = dense(dense_stream)[0], small(small_stream)[0]
            distances.append((dense_stream - small_stream)[:, 0].square().mean().item())
        drifts.append(distances)
    # Of larger models of the digits there is little to repair: 0.88 here.
    assert drifts[1][-1] < 0.95 * drifts[0][-1]


@pytest.mark.usefixtures("plain_layout")
def test_compensation_of_a_whole_model_does_no_harm(calibrated):
    model = build(calibrated, replace(RECIPE, reduction=0.0, compensation="none")).model
    compensate_closed_form(calibrated.dense.model, model, calibrated.statistics, calibrated.fitting, 8, RunFolder())
    assert max(drift.block_drifts(calibrated.dense.model, model, calibrated.fitting)) < 1e-6
    assert held_back_agreement(calibrated, model) == 1.0


@pytest.mark.usefixtures("plain_layout")
@torch.no_grad()
def test_refits_see_a_part_of_the_drift_and_streams_all_of_it(calibrated, monkeypatch):
    """By hand: all of a drift that is smaller by as much gives the same weights; what follows is the block's own."""
    dense, smaller = calibrated.dense.model, replace(RECIPE, compensation="none", rank_multiple=1)
    (source, moments), stream = (dense.vit.blocks[1], calibrated.statistics[1]), calibrated.fitting
    drifted = [batch + 0.1 * torch.randn(batch.shape, generator=torch.Generator().manual_seed(0)) for batch in stream]
    blocks = [build(calibrated, smaller).model.vit.blocks[1] for _ in range(2)]
    behind = [list(stream), list(drifted)]
    _refit_attention(source, blocks[0], moments, *behind, None, 1, 8)
    nearer = [seen.lerp(batch, drift.DRIFT_SEEN) for seen, batch in zip(stream, drifted, strict=True)]
    monkeypatch.setattr(drift, "DRIFT_SEEN", 1.0)
    _refit_attention(source, blocks[1], moments, list(stream), nearer, None, 1, 8)
    torch.testing.assert_close(blocks[0].attention.output.weight, blocks[1].attention.output.weight)
    for batch, (block, before) in zip(behind, ((source, stream), (blocks[0], drifted)), strict=True):
        updated = before[0] + block.attention(block.attention_norm(before[0]))[0]
        torch.testing.assert_close(batch[0], updated)


@pytest.mark.usefixtures("plain_layout")
def test_a_patch_of_three_counts_for_all_where_an_mlp_is_refitted(calibrated, monkeypatch):
    """By patches that come in threes, of which all say the same."""
    whole = replace(RECIPE, reduction=0.0, compensation="none")
    source, moments = calibrated.dense.model.vit.blocks[1], calibrated.statistics[1]

    def thrice(batches):
        return [torch.cat((batch[:, :1], batch[:, 1:].repeat_interleave(3, 1)), 1) for batch in batches]

    generator = torch.Generator().manual_seed(0)
    drifted = [batch + 0.3 * torch.randn(batch.shape, generator=generator) for batch in calibrated.fitting]
    blocks = [build(calibrated, whole).model.vit.blocks[1] for _ in range(2)]
    _refit_mlp(source, blocks[0], moments, thrice(calibrated.fitting), thrice(drifted), 1, 8, 0.1)
    for owner in ("statistics", "compensation.closed_form"):
        monkeypatch.setattr(f"hf_vit_lowrank.{owner}.ONE_PATCH_IN", 1)
    _refit_mlp(source, blocks[1], moments, thrice(calibrated.fitting), thrice(drifted), 1, 8, 0.1)
    first, second = (block.mlp.down.weight for block in blocks)
    assert (first - second).norm() < 1e-3 * (first - source.mlp.down.weight).norm()


def test_half_the_size_keeps_most_digits(calibrated, halved, digits_data):
    dense = top1(calibrated.dense.model, halved, digits_data.validation)
    assert top1(halved.model, halved, digits_data.validation) > dense - 5
    smaller = [
        build(calibrated, replace(RECIPE, reduction=0.95, rank_multiple=1, compensation=kind))
        for kind in ("closed-form", "none")
    ]
    compensated, uncompensated = (held_back_divergence(calibrated, result.model) for result in smaller)
    assert compensated < uncompensated


def test_saved_and_loaded_it_is_the_same_model(halved, tmp_path):
    halved.save_pretrained(tmp_path / "out")
    model, _, record = load_checkpoint(tmp_path / "out")
    assert record["plan"]["mlp_widths"] == model.config.mlp_widths
    for name, tensor in halved.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_max_parameters_and_match(digits_model, digits_data, calibrated):
    limit = int(0.6 * calibrated.dense.parameters)
    data = str(digits_data.calibration)
    limited = plan(str(digits_model), data, CompressionRecipe(max_parameters=limit, samples=64))
    assert 0.99 * limit <= limited["parameters"] <= limit
    matched = plan(str(digits_model), data, CompressionRecipe(match=str(digits_model), samples=64))
    assert matched["parameters"] <= calibrated.dense.parameters


def test_a_compressed_model_can_be_matched_and_its_folder_is_not_told(digits_model, digits_data, halved, tmp_path):
    halved.save_pretrained(tmp_path / "half")
    recipe = CompressionRecipe(match=str(tmp_path / "half"), samples=64)
    result = compress(str(digits_model), str(digits_data.calibration), recipe, device="cpu")
    limit = halved.report["parameters"]
    assert 0.99 * limit <= result.report["parameters"] <= limit
    result.save_pretrained(tmp_path / "other")
    told = json.loads((tmp_path / "other" / "compression.json").read_text())["recipe"]
    assert (told["match"], told["max_parameters"]) == (None, limit)
    CompressionRecipe.from_dict(told)


def test_impossible_size_says_the_smallest(calibrated):
    with pytest.raises(UserError, match="ask for at least"):
        build(calibrated, replace(RECIPE, reduction=0.999))


def test_probing_is_part_of_the_time_expected():
    seconds = {"statistics": 7.0, "candidates": 1.0}
    without, with_probes = (
        expected_seconds(CompressionRecipe(reduction=0.5, probe=probe), 0.5, seconds) for probe in (False, True)
    )
    assert with_probes == {**without, "probes": 63.0}


def test_a_plan_is_what_compress_comes_to_where_images_are_held_back(digits_model, digits_data):
    recipe = replace(RECIPE, compensation="gradient", samples=64)
    images = str(digits_data.calibration)
    calibrated = calibrate(str(digits_model), images, recipe, hold_back=training_share(recipe), device="cpu")
    planned = plan(str(digits_model), images, recipe, device="cpu")
    ranks = ("query_key_ranks", "value_output_ranks", "mlp_widths")
    made = recipe_ranks(calibrated.dense, calibrated.candidates, calibrated.embedding, recipe)
    assert {name: planned["plan"][name] for name in ranks} == {name: getattr(made, name) for name in ranks}


def test_presets_go_on_with_fewer_images_at_once(calibrated, monkeypatch):
    sizes, whole = [], PRESETS["svd"]

    def short_of_memory(inputs, limit):
        sizes.append(inputs.images_at_once)
        if len(sizes) < 3:
            raise MemoryError
        return whole(inputs, limit)

    monkeypatch.setitem(PRESETS, "svd", short_of_memory)
    build(calibrated, replace(RECIPE, preset="svd", compensation=None))
    assert sizes == [8, 4, 2]


def test_min_agreement_finds_a_size_between_its_neighbours(digits_model, digits_data):
    recipe = CompressionRecipe(min_agreement=0.9, samples=128)
    start = time.perf_counter()
    result = compress(str(digits_model), str(digits_data.calibration), recipe, device="cpu")
    whole = time.perf_counter() - start
    measured = result.report["agreement"]
    agreeing = [trial["reduction"] for trial in measured["trials"] if trial["agreement"] >= 0.9]
    assert result.report["reduction"] == pytest.approx(max(agreeing), abs=0.02)
    assert 0.2 < result.report["reduction"] < 0.95
    assert measured["images"] == 25
    assert {"statistics", "surgery", "compensation", "agreement"} < result.report["seconds"].keys()
    assert 0 < sum(result.report["seconds"].values()) < whole


def test_an_agreement_finer_than_an_image_is_warned_of(digits_model, digits_data, caplog, monkeypatch):
    monkeypatch.setattr(importlib.import_module("hf_vit_lowrank.compress"), "HALVINGS", 0)  # no search
    recipe = CompressionRecipe(min_agreement=0.99, samples=32)
    compress(str(digits_model), str(digits_data.calibration), recipe, device="cpu")
    assert "6 images are held back, so that an agreement of 0.99 is one of all of them" in caplog.text


def test_sweep_writes_table_and_picture(digits_model, digits_data, tmp_path):
    data = open_images(str(digits_data.validation), samples=100, seed=None)
    rows = sweep(
        str(digits_model), str(digits_data.calibration), [0.3, 0.6], replace(RECIPE, samples=64), dataset=data,
        output=tmp_path, device="cpu",
    )  # fmt: skip
    assert [row["reduction"] for row in rows] == [0.0, 0.3, 0.6]
    assert rows[0]["parameters"] > rows[1]["parameters"] > rows[2]["parameters"]
    assert rows[0]["flops"] > rows[1]["flops"] > rows[2]["flops"]
    assert json.loads((tmp_path / "sweep.json").read_text())["rows"] == rows
    table = (tmp_path / "sweep.md").read_text()
    assert [line.split()[1] for line in table.splitlines()[2:]] == ["dense", "30", "60"]
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_sweep_refuses_other_classes_before_it_builds(digits_model, digits_data, tmp_path, monkeypatch):
    data = load_dataset("parquet", data_files=str(digits_data.validation), split="train").select(range(10))
    data.cast_column("label", ClassLabel(names=[f"animal {i}" for i in range(10)])).to_parquet(tmp_path / "a.parquet")
    monkeypatch.setattr("hf_vit_lowrank.sweep.build", None)
    with pytest.raises(UserError, match="no single class of the model answers to"):
        sweep(
            str(digits_model), str(digits_data.calibration), [0.3], replace(RECIPE, samples=16),
            dataset=open_images(str(tmp_path / "a.parquet"), seed=None), output=tmp_path / "sweep", device="cpu",
        )  # fmt: skip


def test_query_key_and_value_ranks_differ_between_heads(halved):
    assert len({rank for layer in halved.report["plan"]["query_key_ranks"] for rank in layer}) > 1


def test_importing_the_package_registers_its_classes():
    from transformers import AutoConfig

    assert AutoConfig.for_model("lowrank_vit", num_hidden_layers=1).num_hidden_layers == 1
    assert hf_vit_lowrank.__version__


@pytest.mark.parametrize("tokens", [False, True])
def test_deit_with_two_heads_end_to_end(tokens, digits_data, tmp_path):
    from transformers import (
        DeiTConfig,
        DeiTForImageClassification,
        DeiTForImageClassificationWithTeacher,
        ViTImageProcessor,
    )

    torch.manual_seed(0)
    config = DeiTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        num_labels=10, qkv_bias=tokens,
    )  # fmt: skip
    architecture = DeiTForImageClassificationWithTeacher if tokens else DeiTForImageClassification
    architecture(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    recipe = CompressionRecipe(reduction=0.3, samples=16)
    result = compress(str(tmp_path), str(digits_data.calibration), recipe, device="cpu")
    assert result.report["parameters"] == count_parameters(result.model)


@pytest.mark.slow
def test_deit_tiny_floors(shared_data):
    """Floors on 200 images, well under what is measured on all; a quarter of the calibration images."""
    source, calibration = str(shared_data / "deit-tiny"), str(shared_data / "calibration.parquet")
    calibrated = calibrate(source, calibration, replace(RECIPE, samples=256), device="cpu")
    dense = calibrated.dense
    images = open_images(str(shared_data / "validation.parquet"), samples=200, seed=None)
    for reduction, floor in ((0.2, 72.0), (0.4, 60.0)):
        result = build(calibrated, replace(RECIPE, reduction=reduction))
        assert result.report["parameters"] <= (1 - reduction) * dense.parameters
        assert result.report["parameters"] >= 0.995 * (1 - reduction) * dense.parameters
        measured = evaluate_classifier(result.model, dense.image_processor, images, device="cpu")
        assert measured.top1 >= floor


def test_a_checkpoint_tells_no_folders_of_this_machine(digits_model, halved, tmp_path):
    halved.save_pretrained(tmp_path / "out")
    record = json.loads((tmp_path / "out" / "compression.json").read_text())
    assert record["source"]["location"] == digits_model.name
    for file in (tmp_path / "out").iterdir():
        assert str(digits_model.parent).encode() not in file.read_bytes()
