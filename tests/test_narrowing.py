"""A narrower stream: the same function in fewer entries, the directions that cost least, and the whole path."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import random_model
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import layer_norm

from hf_vit_lowrank import calibration, narrowing
from hf_vit_lowrank.budget import check_reachable, recipe_limit
from hf_vit_lowrank.calibration import calibrate
from hf_vit_lowrank.compress import build, compress
from hf_vit_lowrank.dense_layout import why_not_uniform
from hf_vit_lowrank.divergence import held_back_divergence
from hf_vit_lowrank.embeddings import embedded_by
from hf_vit_lowrank.errors import UserError
from hf_vit_lowrank.evaluation import count_parameters
from hf_vit_lowrank.export import densified
from hf_vit_lowrank.narrowing import (
    _principal_directions,
    entries,
    narrowed,
    stream_basis,
    widened,
    zero_mean_basis,
)
from hf_vit_lowrank.rank_plan import stream_size
from hf_vit_lowrank.recipe import CompressionRecipe
from hf_vit_lowrank.remote.configuration_lowrank_vit import LowRankViTConfig
from hf_vit_lowrank.remote.modeling_lowrank_vit import LowRankViTForImageClassification
from hf_vit_lowrank.run_folder import RunFolder

# So small that the stream of the digits model, 64 entries, gets narrower as well.
RECIPE = CompressionRecipe(reduction=0.8, samples=256)
SHAPE = {
    "layer_norm_eps": 0.01,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "num_labels": 5,
}
PLANS = {
    "full rank": {},
    "no bias": {"qkv_bias": False},
    "a plan": {
        "query_key_ranks": [[3, 5], [8, 1]],
        "value_output_ranks": [[2, 8], [0, 4]],
        "mlp_widths": [7, 24],
        "up_ranks": [5, 9],
        "bypass_ranks": [3, 0],
        "embedding_ranks": {"projection": 5, "positions": 3},
    },
    "distilled": {"use_distillation_token": True, "use_distillation_head": True},
}
PIXELS = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def random_basis(size: int, rank: int) -> torch.Tensor:
    """Orthonormal directions (size, rank) without a mean."""
    values = torch.randn(size, rank, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return torch.linalg.qr(values - values.mean(0))[0]


@torch.no_grad()
def logits(model: nn.Module, pixels: torch.Tensor = PIXELS) -> torch.Tensor:
    return model(pixels).logits


@torch.no_grad()
def confined(model: LowRankViTForImageClassification, basis: torch.Tensor) -> LowRankViTForImageClassification:
    """By hand: the model, where everything that is added to its stream is projected onto the basis."""
    projection, copy = (basis @ basis.mT).float(), LowRankViTForImageClassification(model.config).eval()
    copy.load_state_dict(model.state_dict())
    embeddings = copy.vit.embeddings
    embeddings.register_forward_hook(lambda module, inputs, output: output @ projection)
    for block in copy.vit.blocks:
        for written in (block.attention.output, block.mlp):
            written.register_forward_hook(lambda module, inputs, output: output @ projection)
    return copy


@given(st.integers(1, 40))
def test_zero_mean_basis(size):
    basis = zero_mean_basis(size)
    assert basis.shape == (size, size + 1)
    torch.testing.assert_close(basis @ basis.mT, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(basis.sum(1), torch.zeros(size, dtype=torch.float64))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_narrowed_is_the_confined_model_in_fewer_entries(plan):
    model, basis = random_model(0.4, **SHAPE, **plan), random_basis(16, 11)
    narrow = narrowed(model, basis)
    assert (narrow.config.hidden_size, narrow.config.dense_hidden_size) == (12, 16)
    torch.testing.assert_close(logits(narrow), logits(confined(model, basis)), atol=1e-4, rtol=1e-4)
    stream = model.vit.embeddings(PIXELS)
    torch.testing.assert_close(narrow.vit.embeddings(PIXELS), stream @ entries(basis).float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_all_directions_without_a_mean_are_the_whole_model(plan):
    model = random_model(0.4, **SHAPE, **plan)
    same = narrowed(model, random_basis(16, 15))
    torch.testing.assert_close(logits(same), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_widened_is_the_same_function_in_more_entries(plan):
    narrow = narrowed(random_model(0.4, **SHAPE, **plan), random_basis(16, 9))
    narrow.vit.blocks[0].mlp.down.bias.data += 1.0  # a mean, as training may leave one
    wide = widened(narrow, 16)
    assert wide.config.hidden_size == wide.config.dense_hidden_size == 16
    torch.testing.assert_close(logits(wide), logits(narrow), atol=1e-4, rtol=1e-4)


def test_heads_that_do_not_divide_the_stream_are_not_native():
    narrow = narrowed(random_model(0.4, **SHAPE), random_basis(16, 10))
    assert "11 entries is no multiple of its 2 heads" in (why_not_uniform(narrow.config) or "")
    assert why_not_uniform(narrowed(random_model(0.4, **SHAPE), random_basis(16, 11)).config) is None


def test_stream_gets_narrower_from_some_size_on():
    tiny, base = (LowRankViTConfig(hidden_size=size, num_attention_heads=size // 64) for size in (192, 768))
    assert [stream_size(tiny, removed) for removed in (0.0, 0.2, 0.4, 0.5, 0.6, 0.8)] == [192, 192, 192, 192, 176, 136]
    assert [stream_size(base, removed) for removed in (0.2, 0.4, 0.6)] == [768, 768, 704]


def test_dense_hidden_size_is_checked():
    assert LowRankViTConfig(hidden_size=192, num_attention_heads=3).dense_hidden_size == 192
    for wrong in (191, True, 192.0, "192", 10**9):
        with pytest.raises(ValueError, match="dense_hidden_size"):
            LowRankViTConfig(hidden_size=192, num_attention_heads=3, dense_hidden_size=wrong)


# --------------------------------------------------------------------------------------------------------- the digits


@pytest.fixture(scope="module")
def calibrated(digits_model, digits_data):
    return calibrate(str(digits_model), str(digits_data.calibration), RECIPE, hold_back=0.25, device="cpu")


@pytest.fixture(scope="module")
def small(calibrated):
    return build(calibrated, RECIPE)


def test_principal_directions_hold_most_of_what_layer_norms_read(calibrated):
    model, images = calibrated.dense.model, torch.cat(calibrated.fitting)[:64]
    directions, seen = _principal_directions(model, images, 16)
    assert torch.linalg.norm(directions.sum(0)) < 1e-9
    read = []
    hooks = [
        norm.register_forward_pre_hook(lambda _, inputs: read.append(layer_norm(inputs[0], inputs[0].shape[-1:])))
        for norm in model.modules()
        if isinstance(norm, nn.LayerNorm)
    ]
    stream = images
    for layer, block in enumerate(model.vit.blocks):
        stream, _ = block(stream, 1 if layer == len(model.vit.blocks) - 1 else None)
    torch.testing.assert_close(model.classify(model.vit.norm(stream))[0], seen, atol=1e-4, rtol=1e-4)
    for hook in hooks:
        hook.remove()
    others = sum(normed.shape[1] - 1 for normed in read)
    weight = (others / len(hooks)) ** -0.5  # of a patch beside a class token

    def held(basis: torch.Tensor) -> float:
        squares = [(normed.double() @ basis).square().sum((0, 2)) for normed in read]
        return float(sum(one[0] + weight * one[1:].sum() for one in squares))

    for rank in (1, 8, 40):
        best = held(directions[:, :rank])
        generator = torch.Generator().manual_seed(rank)
        for step in (1e-2, 0.3, 10.0):
            other = directions[:, :rank] + step * torch.randn(64, rank, generator=generator, dtype=torch.float64)
            assert held(torch.linalg.qr(other - other.mean(0))[0]) <= best * (1 + 1e-9)


def test_a_failure_leaves_no_hook_behind(calibrated, monkeypatch):
    model = calibrated.dense.model
    monkeypatch.setattr(narrowing, "_confined_logits", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stream_basis(model, calibrated.fitting[0], 48, 0, 8)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_learned_directions_are_nearer_to_the_dense_model(calibrated):
    images = torch.cat(calibrated.fitting)
    model = calibrated.dense.model
    principal = _principal_directions(model, images, 16)[0][:, :11]
    learned = stream_basis(model, images, 12, 0, 8)
    torch.testing.assert_close(learned.mT @ learned, torch.eye(11, dtype=torch.float64))
    assert torch.linalg.norm(learned.sum(0)) < 1e-9
    assert torch.equal(learned, stream_basis(model, images, 12, 0, 8))
    before, after = (held_back_divergence(calibrated, narrowed(model, basis)) for basis in (principal, learned))
    assert after < before


def test_compressed_with_a_narrower_stream(calibrated, small):
    model, report = small.model, small.report
    assert (model.config.hidden_size, model.config.dense_hidden_size) == (48, 64) == (report["plan"]["hidden_size"], 64)
    assert count_parameters(model) == report["parameters"] <= 0.2 * report["dense_parameters"]
    assert report["dense_parameters"] == calibrated.dense.parameters
    assert held_back_divergence(calibrated, model) < 0.01


def test_embeddings_of_a_narrower_model_follow_from_those_of_the_dense_one(calibrated, small):
    dense, pixels = calibrated.dense.model, torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        (embedded,) = embedded_by(small.model, dense, [dense.vit.embeddings(pixels)])
        torch.testing.assert_close(embedded, small.model.vit.embeddings(pixels), atol=1e-4, rtol=1e-4)


def test_exported_at_dense_size(small):
    pixels = torch.randn(4, 3, 32, 32)
    whole = densified(small.model)
    assert whole.config.hidden_size == 64
    torch.testing.assert_close(logits(whole, pixels), logits(small.model, pixels), atol=1e-4, rtol=1e-4)


def test_a_size_that_only_a_narrower_stream_reaches_is_not_refused(calibrated):
    recipe = replace(RECIPE, reduction=0.93, compensation="none")
    check_reachable(calibrated.dense, recipe)
    assert count_parameters(build(calibrated, recipe).model) <= recipe_limit(calibrated.dense, recipe)
    with pytest.raises(UserError, match="ask for at least"):
        check_reachable(calibrated.dense, replace(recipe, reduction=0.97))


def test_one_narrower_stream_is_held_at_a_time(calibrated):
    sizes = [calibrated.narrower(replace(RECIPE, reduction=reduction)).dense.model for reduction in (0.7, 0.8, 0.7)]
    assert sizes[0].config.hidden_size == sizes[2].config.hidden_size > sizes[1].config.hidden_size
    assert list(calibrated.narrowed) == [sizes[2].config.hidden_size]


def test_native_plans_other_methods_and_training_keep_the_whole_stream(calibrated):
    changes = (
        {"native": True},
        {"preset": "svd", "compensation": None},
        {"compensation": "gradient"},
        {"reduction": 0.5},
    )
    for change in changes:
        assert calibrated.narrower(replace(RECIPE, **change)) is calibrated
    assert calibrated.narrower(RECIPE) is calibrated.narrower(replace(RECIPE, compensation="none"))


def test_a_run_goes_on_behind_the_stream_that_it_learned(digits_model, digits_data, tmp_path, monkeypatch):
    arguments = str(digits_model), str(digits_data.calibration), RECIPE
    whole = compress(*arguments, device="cpu", run_folder=tmp_path / "run")
    assert RunFolder(tmp_path / "run" / "stream-48").has("stream")
    for file in tmp_path.glob("run/surgery.pt"):
        file.unlink()
    monkeypatch.setattr(calibration, "stream_basis", None)  # is not asked for
    again = compress(*arguments, device="cpu", run_folder=tmp_path / "run")
    limited = compress(*arguments, device="cpu", run_folder=tmp_path / "run", memory_limit=10**10)
    for one in (again, limited):
        assert all(map(torch.equal, one.model.state_dict().values(), whole.model.state_dict().values()))
