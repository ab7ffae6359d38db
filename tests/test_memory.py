"""A run under a memory limit: the same result from groups of blocks, and a limit that is too low said before."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch

from hf_vit_lowrank import calibration, processes
from hf_vit_lowrank.compress import compress
from hf_vit_lowrank.errors import UserError
from hf_vit_lowrank.images import open_images
from hf_vit_lowrank.memory import MemoryPlan, memory_plan, parse_bytes
from hf_vit_lowrank.recipe import VIEWS, CompressionRecipe
from hf_vit_lowrank.remote.configuration_lowrank_vit import LowRankViTConfig

RECIPE = CompressionRecipe(reduction=0.5, samples=64)
HUGE = LowRankViTConfig(
    hidden_size=1280, num_hidden_layers=32, num_attention_heads=16, intermediate_size=5120, patch_size=14
)


def test_groups_of_blocks_give_the_plan_and_weights_of_all_at_once(digits_model, digits_data, tmp_path, monkeypatch):
    images = str(digits_data.calibration)

    def run(**options):
        return compress(str(digits_model), open_images(images, samples=64), RECIPE, device="cpu", **options)

    whole = run()
    monkeypatch.setattr(
        calibration, "memory_plan", lambda *_: MemoryPlan(calibration.CPU_IMAGES_AT_ONCE, 32, 2, 2, 0, 0)
    )
    collect, earlier = calibration.Calibrated._collected, []

    def watched(*arguments):
        assert all(moments() is None for moments in earlier)  # two groups at once would be beyond the limit
        collected = collect(*arguments)
        earlier.extend(map(weakref.ref, collected))
        return collected

    monkeypatch.setattr(calibration.Calibrated, "_collected", watched)
    groups = run(memory_limit=1, run_folder=tmp_path / "run")
    assert len(earlier) == 3
    assert groups.report["plan"] == whole.report["plan"]
    parked = sorted(path.name for path in (tmp_path / "run" / "blocks").iterdir())
    assert parked == [f"{kind}-{layer}.pt" for kind in ("candidates", "statistics") for layer in range(3)]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(groups.model.state_dict()[name], tensor), name


def test_smaller_batches_and_groups_until_it_fits():
    free = memory_plan(HUGE, RECIPE, 32)
    assert (free.batch_size, free.group, free.passes) == (32, 32, 1)
    assert free.peak > 20e9
    limited = memory_plan(HUGE, RECIPE, 32, 20 * 10**9)
    assert limited.peak <= 20e9
    assert 1 <= limited.batch_size < 32
    assert limited.passes == -(-32 // limited.group) > 1


def test_a_limit_that_is_too_low_says_how_much_it_takes():
    with pytest.raises(UserError, match=r"4\.0 GB do not do for this model and 64 images: allow at least \d+\.\d GB"):
        memory_plan(HUGE, RECIPE, 32, 4 * 10**9)


@pytest.mark.parametrize(
    ("options", "streams"),
    [({"compensation": "gradient"}, 3 * (1 + VIEWS)), ({"probe": True}, 6), ({}, 5)],
    ids=["gradient", "probe", "closed-form"],
)
def test_what_compensation_holds_of_every_image_is_counted(options, streams):
    few, many = (
        memory_plan(HUGE, replace(RECIPE, samples=samples, **options), 1).peak for samples in (100_000, 200_000)
    )
    stream = 4 * 257 * 1280  # float32, 256 patches and the class token
    pixels = 3 * 3 * 224**2 if "compensation" in options else 0
    assert many - few == 100_000 * ((1 + streams) * stream + pixels)


def test_methods_that_factor_weights_hold_the_moments_of_all():
    ours, theirs = (
        memory_plan(HUGE, CompressionRecipe(reduction=0.4, samples=64, preset=preset), 1).peak
        for preset in ("corp", "fwsvd")
    )
    assert theirs - ours == 32 * 8 * (14 * 1280**2 + 2 * 5120**2)


def test_training_the_whole_counts_the_activations_of_a_batch():
    peaks = [
        memory_plan(HUGE, replace(RECIPE, samples=1, batch_size=size, compensation="distill"), 1).peak
        for size in (1, 1001)
    ]
    assert peaks[1] - peaks[0] > 1000 * 32 * 4 * 257 * 2 * 5120  # of 32 blocks at least the hidden units


def test_several_processes_share_the_images_but_for_presets_and_views(monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 8)
    few, many = (replace(RECIPE, samples=samples) for samples in (100_000, 200_000))
    stream = 4 * 257 * 1280

    def more(**options):
        peaks = [memory_plan(HUGE, replace(recipe, **options), 1).peak for recipe in (few, many)]
        return peaks[1] - peaks[0]

    assert more() == 100_000 // 8 * 6 * stream
    assert more(preset="svd", compensation="none") == 100_000 * 6 * stream
    assert more(compensation="gradient") == 100_000 // 8 * (3 * (1 + VIEWS) + 1) * stream + 100_000 * 3 * 3 * 224**2


def test_fewer_images_at_once_are_distilled_where_memory_is_short():
    recipe = replace(RECIPE, compensation="distill", batch_size=256)
    free = memory_plan(HUGE, recipe, 8)
    assert free.distilled == 256
    limited = memory_plan(HUGE, recipe, 8, 40 * 10**9)
    assert free.peak > 40e9 >= limited.peak
    assert 1 < limited.distilled < 256
    assert memory_plan(HUGE, replace(recipe, gradient_checkpointing=True), 8).peak < free.peak


def test_a_limit_needs_a_run_folder(digits_model, digits_data):
    with pytest.raises(UserError, match="run folder"):
        compress(str(digits_model), str(digits_data.calibration), RECIPE, device="cpu", memory_limit=10**12)


@pytest.mark.parametrize(("text", "count"), [("16GB", 16 * 10**9), ("800 mb", 8 * 10**8), ("1.5G", 15 * 10**8)])
def test_amounts(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "much", "16GiB", "-1GB"])
def test_no_amount(text):
    with pytest.raises(UserError, match="write 16GB"):
        parse_bytes(text)
