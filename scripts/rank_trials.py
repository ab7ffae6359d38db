"""Other ways to choose ranks than by the error curves of the dense model alone, for bench_trials.py.

Both measure again where the curves only predict: on a model that is smaller already, or piece by piece on the model
that the curves led to. Each returns a compressed model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from hf_vit_lowrank.allocation import ErrorCurve
from hf_vit_lowrank.budget import recipe_ranks
from hf_vit_lowrank.calibration import NOWHERE, Calibrated
from hf_vit_lowrank.candidates.block import BlockCandidates, UnitCosts, block_candidates
from hf_vit_lowrank.compensation.closed_form import refit_block
from hf_vit_lowrank.compensation.drift import moved
from hf_vit_lowrank.compensation.steps import compensate
from hf_vit_lowrank.embeddings import embedded_by
from hf_vit_lowrank.export import densified
from hf_vit_lowrank.rank_plan import RankPlan, model_costs
from hf_vit_lowrank.recipe import CompressionRecipe
from hf_vit_lowrank.remote.modeling_lowrank_vit import LowRankViTBlock, LowRankViTForImageClassification
from hf_vit_lowrank.statistics import collect_statistics
from hf_vit_lowrank.surgery import shrink

# A piece is made smaller and larger by so much to see what its size is worth.
PROBE = 24
# Images that this is measured on, of those that the model is fitted on.
PROBED_IMAGES = 300
# A curve's errors are multiplied by at most this, and by no less than one over it.
LARGEST_FACTOR = 2.0


def in_two_steps(calibrated: Calibrated, recipe: CompressionRecipe) -> LowRankViTForImageClassification:
    """Half of the reduction first; then statistics and error curves of that model, compensated, for the other half.

    The stream to reach stays the dense model's.
    """
    assert recipe.reduction is not None
    half = replace(recipe, reduction=recipe.reduction / 2)
    whole = densified(_compressed(calibrated, calibrated.candidates, half)).requires_grad_(False)
    fitting = embedded_by(whole, calibrated.dense.model, calibrated.fitting)
    statistics = collect_statistics(whole, fitting, recipe.seed, torch.float32, None, calibrated.images_at_once)
    blocks: Any = zip(whole.vit.blocks, statistics, strict=True)
    candidates = [block_candidates(block, moments) for block, moments in blocks]
    plan = recipe_ranks(calibrated.dense, candidates, calibrated.embedding, recipe)
    small = shrink(whole, candidates, calibrated.embedding, statistics, plan)
    compensate(calibrated, small, recipe, {}, NOWHERE)
    return small


def probed(calibrated: Calibrated, recipe: CompressionRecipe) -> LowRankViTForImageClassification:
    """Every piece of the compensated model is made smaller and larger in turn, its block refitted, and the divergence
    measured at the model's end. Curves are multiplied by the root of what they predicted too little, and ranks chosen
    again."""
    candidates = [Weighed(block) for block in calibrated.candidates]
    model = _compressed(calibrated, candidates, replace(recipe, compensation="closed-form"))
    plan = _plan(calibrated, candidates, recipe)
    worth = _measured_worth(calibrated, recipe, plan, model)
    middle = sorted(worth.values())[len(worth) // 2]
    for (layer, piece), ratio in worth.items():
        factor = max(ratio / middle, 0.0) ** 0.5
        candidates[layer].factors[piece] = min(max(factor, 1 / LARGEST_FACTOR), LARGEST_FACTOR)
        print(f"block {layer + 1}, {('query-key', 'value-output', 'MLP')[piece]}: measured / predicted {ratio:.2f}")
    return _compressed(calibrated, candidates, recipe)


class Weighed:
    """The candidates of a block, with factors on the error curves of query-key, value-output and width."""

    def __init__(self, candidates: BlockCandidates):
        self.candidates, self.factors = candidates, [1.0, 1.0, 1.0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.candidates, name)

    def curves(self, costs: UnitCosts, query_key_weight: float, multiple: int) -> list[ErrorCurve]:
        curves = self.candidates.curves(costs, query_key_weight, multiple)
        return [
            replace(curve, errors=factor * curve.errors) for curve, factor in zip(curves, self.factors, strict=True)
        ]


def _plan(calibrated: Calibrated, candidates: Any, recipe: CompressionRecipe) -> RankPlan:
    return recipe_ranks(calibrated.dense, candidates, calibrated.embedding, recipe)


def _compressed(calibrated: Calibrated, candidates: Any, recipe: CompressionRecipe) -> LowRankViTForImageClassification:
    parts = calibrated.dense.model, candidates, calibrated.embedding, calibrated.statistics
    model = shrink(*parts, _plan(calibrated, candidates, recipe))
    compensate(calibrated, model, recipe, {}, NOWHERE)
    return model


@torch.no_grad()
def _measured_worth(
    calibrated: Calibrated, recipe: CompressionRecipe, plan: RankPlan, model: LowRankViTForImageClassification
) -> dict[tuple[int, int], float]:
    """By layer and piece, how much the divergence falls with the piece's size over what its curve predicts."""
    dense, num_read = calibrated.dense.model, calibrated.dense.model.config.num_tokens_read
    costs, _ = model_costs(dense.config, "parameters", False)
    dense_stream, small_stream = (embedded_by(model, dense, calibrated.fitting) for _ in range(2))
    expected = _logits(dense, list(calibrated.fitting), 0)[:PROBED_IMAGES].log_softmax(-1)
    layers, worth = len(dense.vit.blocks), {}

    def divergence(block: LowRankViTBlock, layer: int, queries: int | None) -> float:
        """With the block of the plan exchanged for this one, refitted."""
        streams = list(dense_stream), list(small_stream)
        refit_block(dense.vit.blocks[layer], block, calibrated.statistics[layer], *streams, queries, num_read)
        probes = torch.cat(small_stream)[:PROBED_IMAGES].split(len(small_stream[0]))
        logits = _logits(model, moved(block, probes, queries), layer + 1)
        return float(kl_div(logits.log_softmax(-1), expected, log_target=True, reduction="batchmean"))

    for layer, candidate in enumerate(calibrated.candidates):
        queries = num_read if layer == layers - 1 else None
        curves = candidate.curves(costs[layer], recipe.query_key_weight, recipe.rank_multiple)
        sizes = sum(plan.query_key_ranks[layer]), sum(plan.value_output_ranks[layer]), plan.mlp_widths[layer]
        for piece, (size, curve) in enumerate(zip(sizes, curves, strict=True)):
            tried = max(size - PROBE, curve.sizes[0]), min(size + PROBE, curve.largest)
            smaller, larger = (
                divergence(_resized_block(calibrated, plan, layer, piece, probe), layer, queries) for probe in tried
            )
            worth[layer, piece] = (smaller - larger) / float(curve.errors[tried[0]] - curve.errors[tried[1]])
        dense_stream = moved(dense.vit.blocks[layer], dense_stream, queries)
        small_stream = moved(model.vit.blocks[layer], small_stream, queries)
    return worth


def _resized_block(calibrated: Calibrated, plan: RankPlan, layer: int, piece: int, size: int) -> LowRankViTBlock:
    """The block of the plan with another size of one piece, refitted on the dense statistics alone."""
    candidate = calibrated.candidates[layer]
    if piece == 0:
        field, own = "query_key_ranks", candidate.query_key.head_ranks(size)
    elif piece == 1:
        field, own = "value_output_ranks", candidate.value_output.head_ranks(size)
    else:
        field, own = "mlp_widths", size
    sizes = [own if index == layer else other for index, other in enumerate(getattr(plan, field))]
    parts = calibrated.dense.model, calibrated.candidates, calibrated.embedding, calibrated.statistics
    blocks: Any = shrink(*parts, replace(plan, **{field: sizes})).vit.blocks
    return blocks[layer]


def _logits(model: LowRankViTForImageClassification, stream: list[Tensor], first: int) -> Tensor:
    """(images, classes) in float64 from what block `first` reads."""
    blocks: Any = list(model.vit.blocks)[first:]
    for block in blocks:
        stream = moved(block, stream, None)
    return torch.cat([model.classify(model.vit.norm(batch))[0].double() for batch in stream])
