"""The embeddings as products of two: best in their metric, the same by pixels and by the dense model's tokens, counted
right and taken only where they pay."""

from __future__ import annotations

import pytest
import torch

from hf_vit_lowrank.calibration import calibrate
from hf_vit_lowrank.candidates.embedding import embedding_candidates
from hf_vit_lowrank.compress import build
from hf_vit_lowrank.embeddings import embedded_by
from hf_vit_lowrank.evaluation import count_flops, count_parameters
from hf_vit_lowrank.plan_costs import largest_embedding_ranks, plan_cost
from hf_vit_lowrank.recipe import CompressionRecipe
from hf_vit_lowrank.remote.configuration_lowrank_vit import LowRankViTConfig
from hf_vit_lowrank.remote.modeling_lowrank_vit import LowRankViTForImageClassification
from hf_vit_lowrank.statistics import Moments, TokenGroups
from hf_vit_lowrank.surgery import _shrink_embeddings, resized

SIZE, PATCHES, TOKENS = 6, 4, 500


@pytest.fixture
def case():
    """Projections (tokens, d), position embeddings (patches, d), gradients (tokens, d), and the candidates."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    projections = torch.randn(TOKENS, SIZE, generator=generator, dtype=torch.float64) @ mixing + 3
    positions = torch.randn(PATCHES, SIZE, generator=generator, dtype=torch.float64) + 1
    gradients = torch.randn(TOKENS, SIZE, generator=generator, dtype=torch.float64) @ mixing.mT
    moments, groups = Moments.zeros(SIZE), TokenGroups.zeros(SIZE)
    moments.add(projections.float())
    groups.add(torch.cat((torch.zeros(1, 1, SIZE), gradients[None].float()), 1), 1)
    return projections, positions, gradients, embedding_candidates(moments, positions, groups)


def loss(gradients: torch.Tensor, errors: torch.Tensor) -> float:
    """½ Σ (gᵀ e)² over the tokens of an image, for gradients that do not depend on the errors."""
    metric = gradients.mT @ gradients / len(gradients)
    return 0.5 * float(((errors @ metric) * errors).sum())


@pytest.mark.parametrize("rank", range(1, SIZE))
def test_curves_say_what_the_factors_lose(case, rank):
    projections, positions, gradients, candidates = case
    curves = candidates.curves({"projection": SIZE, "positions": PATCHES - 1}, {"projection": 7, "positions": 5}, 1)
    expand, reduce = candidates.projection.factors(rank)
    centred = projections - projections.mean(0)
    lost = loss(gradients, centred - centred @ (expand @ reduce).mT) / TOKENS * PATCHES
    assert curves["projection"].errors[rank] == pytest.approx(lost, rel=1e-4)
    assert curves["projection"].errors[-1] == 0.0
    if rank < PATCHES:
        expand, reduce = candidates.positions.factors(rank)
        lost = loss(gradients, positions - positions.mean(0) - expand @ reduce)
        assert curves["positions"].errors[rank] == pytest.approx(lost, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("piece", ["projection", "positions"])
def test_no_factors_of_that_rank_lose_less(case, piece):
    projections, positions, gradients, candidates = case
    metric = gradients.mT @ gradients / len(gradients)
    candidate = getattr(candidates, piece)
    values = (projections - projections.mean(0)) if piece == "projection" else positions - positions.mean(0)
    expand, reduce = (factor.clone().requires_grad_(True) for factor in candidate.factors(2))

    def lost() -> torch.Tensor:
        errors = values - (values @ (expand @ reduce).mT if piece == "projection" else expand @ reduce)
        return ((errors @ metric) * errors).sum()

    best = float(lost().detach())
    optimizer = torch.optim.Adam([expand, reduce], 1e-3)
    for _ in range(300):
        optimizer.zero_grad()
        lost().backward()
        optimizer.step()
    assert float(lost().detach()) >= 0.999 * best


# --------------------------------------------------------------------------------------------------------- the digits


@pytest.fixture(scope="module")
def calibrated(digits_model, digits_data):
    recipe = CompressionRecipe(reduction=0.5, samples=128)
    return calibrate(str(digits_model), str(digits_data.calibration), recipe, hold_back=0.1, device="cpu")


def with_ranks(calibrated, **ranks) -> LowRankViTForImageClassification:
    dense = calibrated.dense.model
    config = LowRankViTConfig.from_dict({**dense.config.to_dict(), "embedding_ranks": ranks})
    small = resized(dense, config)
    _shrink_embeddings(small, dense, calibrated.embedding)
    return small


@pytest.mark.parametrize("ranks", [{"projection": 2}, {"positions": 5}, {"projection": 3, "positions": 1}, {}])
@torch.no_grad()
def test_tokens_of_the_dense_model_lead_to_the_same_embeddings_as_pixels(calibrated, ranks):
    dense, small = calibrated.dense.model, with_ranks(calibrated, **ranks)
    pixels = calibrated.views.plain(range(20))
    expected = small.vit.embeddings(pixels)
    (embedded,) = embedded_by(small, dense, [dense.vit.embeddings(pixels)])
    torch.testing.assert_close(embedded, expected, atol=1e-5, rtol=1e-5)
    if ranks:
        assert not torch.allclose(expected, dense.vit.embeddings(pixels), atol=1e-3)
    assert torch.allclose(expected[:, 0], dense.vit.embeddings(pixels)[:, 0], atol=1e-6)


@torch.no_grad()
def test_at_the_rank_of_the_patches_no_logit_changes(calibrated):
    dense = calibrated.dense.model
    pixels = calibrated.views.plain(range(20))
    kernel = dense.vit.embeddings.projection.weight.flatten(1)
    whole = with_ranks(calibrated, projection=min(kernel.shape), positions=len(calibrated.embedding.positions.expand))
    torch.testing.assert_close(whole(pixels).logits, dense(pixels).logits, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("cost", ["parameters", "flops"])
@pytest.mark.parametrize("reduction", [0.0, 0.5, 0.8])
def test_plans_count_the_embeddings_right(calibrated, cost, reduction):
    recipe = CompressionRecipe(reduction=reduction, cost=cost, compensation="none", samples=128, rank_multiple=1)
    result = build(calibrated, recipe)
    counted = {"parameters": count_parameters(result.model), "flops": count_flops(result.model)}
    assert {name: result.report[name] for name in counted} == counted
    assert counted[cost] <= (1 - reduction) * result.report[f"dense_{cost}"]
    ranks = result.model.config.embedding_ranks
    largest = largest_embedding_ranks(calibrated.dense.model.config, cost, 1)
    assert all(ranks[name] <= largest[name] for name in ranks)
    if reduction == 0.0:
        assert not ranks
    if cost == "flops":
        assert "positions" not in ranks  # a product more


def test_a_piece_pays_on_the_digits(calibrated):
    recipe = CompressionRecipe(reduction=0.7, compensation="none", samples=128, rank_multiple=1)
    result = build(calibrated, recipe)
    assert result.model.config.embedding_ranks
    assert result.report["plan"]["embedding_ranks"] == result.model.config.embedding_ranks


def test_before_a_single_block_the_embeddings_stay_whole():
    sizes = {"hidden_size": 12, "num_attention_heads": 3, "intermediate_size": 20, "image_size": 16, "patch_size": 4}
    one, two = (LowRankViTConfig(**sizes, num_hidden_layers=layers) for layers in (1, 2))
    assert largest_embedding_ranks(one, "parameters", 1) == {}
    # Nine patches have nine ranks, of which each is so much cheaper than the whole that a tenth would be as well.
    fields = {"hidden_size": 256, "image_size": 24, "patch_size": 8, "use_distillation_token": True}
    assert list(largest_embedding_ranks(LowRankViTConfig(**fields), "parameters", 8)) == ["projection"]
    assert largest_embedding_ranks(two, "parameters", 1) == {"projection": 9, "positions": 7}
    assert largest_embedding_ranks(two, "parameters", 8) == {"projection": 9}
    factored = LowRankViTConfig(**sizes, num_hidden_layers=2, embedding_ranks={"projection": 9, "positions": 7})
    assert plan_cost(factored, "parameters") < plan_cost(two, "parameters")
