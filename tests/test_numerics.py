"""Weights and images at the edge of arithmetic: a finite result or a clear error, whatever the method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_faults import NAMES, SIZE, make_pictures, make_source

from hf_vit_lowrank.calibration import Calibrated, calibrate
from hf_vit_lowrank.checkpoint import load_checkpoint
from hf_vit_lowrank.compress import build
from hf_vit_lowrank.errors import RunError
from hf_vit_lowrank.presets import PRESETS
from hf_vit_lowrank.recipe import OURS, CompressionRecipe

State = dict[str, torch.Tensor]


def _scaled(part: str, factor: float) -> Callable[[State], None]:
    def change(state: State) -> None:
        for name in state:
            if part in name:
                state[name] *= factor

    return change


def _dead_units(state: State) -> None:
    for name in state:
        if "intermediate.dense.weight" in name:
            state[name][::2] = 0
        if "intermediate.dense.bias" in name:
            state[name][::2] = -100


def _outlier_channels(state: State) -> None:
    state["vit.embeddings.patch_embeddings.projection.weight"][3] *= 1000
    state["vit.embeddings.position_embeddings"][..., 7] *= 1000


def _half(state: State) -> None:
    for name in state:
        state[name] = state[name].half()


def _nothing(state: State) -> None:
    pass


def _one(folder: Path) -> Path:
    return make_pictures(folder, 1)


def _duplicates(folder: Path) -> Path:
    picture = make_pictures(folder, 1) / "000.png"
    for copy in range(1, 30):
        (folder / f"{copy:03}.png").write_bytes(picture.read_bytes())
    return folder


def _constant(folder: Path) -> Path:
    folder.mkdir()
    for shade in range(30):
        Image.new("RGB", (SIZE, SIZE), (8 * shade, 8 * shade, 8 * shade)).save(folder / f"{shade:03}.png")
    return folder


# What is done to the weights, and to the images.
CASES: dict[str, tuple[Callable[[State], None], Callable[[Path], Path]]] = {
    "plain": (_nothing, make_pictures),
    "one image": (_nothing, _one),
    "duplicate images": (_nothing, _duplicates),
    "constant images": (_nothing, _constant),
    "dead units": (_dead_units, make_pictures),
    "dead values": (_scaled("attention.value", 0.0), make_pictures),
    "dead queries": (_scaled("attention.query", 0.0), make_pictures),
    "all weights zero": (_scaled("", 0.0), make_pictures),
    "fp16 source": (_half, make_pictures),
    "tiny weights": (_scaled("output.dense", 1e-20), make_pictures),
    "huge weights": (_scaled("output.dense", 1e10), make_pictures),
    "huge queries": (_scaled("attention.query", 1e6), make_pictures),
    "huge classifier": (_scaled("classifier", 1e20), make_pictures),
    "outlier channels": (_outlier_channels, make_pictures),
    "outlier norm": (_scaled("layernorm_after.weight", 1000.0), make_pictures),
}
RECIPE = CompressionRecipe(reduction=0.3, rank_multiple=1)  # within reach of every preset


@pytest.fixture(scope="module", params=CASES)
def calibrated(request, tmp_path_factory) -> Calibrated:
    change, make_images = CASES[request.param]
    folder = tmp_path_factory.mktemp("numerics")
    source = make_source(folder / "dense")
    state = load_file(source / "model.safetensors")
    change(state)
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    return calibrate(str(source), str(make_images(folder / "pictures")), RECIPE, device="cpu")


def finite_or_refused(calibrated: Calibrated, recipe: CompressionRecipe, folder: Path) -> None:
    try:
        result = build(calibrated, recipe)
    except RunError as error:
        if "not finite" not in str(error):
            raise
        return
    result.save_pretrained(folder)  # compares the logits of what it reads back, which NaN would not survive
    model, _, record = load_checkpoint(folder)
    images = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(images).logits
    assert logits.shape == (4, len(NAMES))
    assert logits.isfinite().all()
    assert record["parameters"] <= 0.7 * calibrated.dense.parameters


@pytest.mark.parametrize("compensation", [pytest.param("none", marks=pytest.mark.slow), "closed-form"])
def test_own_method(compensation, calibrated, tmp_path):
    finite_or_refused(calibrated, replace(RECIPE, compensation=compensation), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset, calibrated, tmp_path):
    finite_or_refused(calibrated, replace(RECIPE, preset=preset, compensation="none"), tmp_path / "out")


def test_the_same_seed_gives_the_same_bits(calibrated):
    assert (RECIPE.preset, RECIPE.compensation) == (OURS, "closed-form")
    states = [build(calibrated, RECIPE).model.state_dict() for _ in range(2)]
    assert all(torch.equal(values, states[1][name]) for name, values in states[0].items())
