"""Another way to choose ranks, for bench_trials.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from hf_vit_lowrank.budget import recipe_ranks
from hf_vit_lowrank.calibration import NOWHERE, Calibrated
from hf_vit_lowrank.candidates.block import block_candidates
from hf_vit_lowrank.compensation.steps import compensate
from hf_vit_lowrank.compress import build
from hf_vit_lowrank.embeddings import embedded_by
from hf_vit_lowrank.export import densified
from hf_vit_lowrank.recipe import CompressionRecipe
from hf_vit_lowrank.remote.modeling_lowrank_vit import LowRankViTForImageClassification
from hf_vit_lowrank.statistics import collect_statistics
from hf_vit_lowrank.surgery import shrink


def in_two_steps(calibrated: Calibrated, recipe: CompressionRecipe) -> LowRankViTForImageClassification:
    """Half of the reduction first; then statistics and error curves of that model, compensated, for the other half.

    The stream to reach stays the dense model's.
    """
    assert recipe.reduction is not None
    half = replace(recipe, reduction=recipe.reduction / 2)
    whole = densified(build(calibrated, half).model).requires_grad_(False)
    fitting = embedded_by(whole, calibrated.dense.model, calibrated.fitting)
    statistics = collect_statistics(whole, fitting, recipe.seed, torch.float32, None, calibrated.images_at_once)
    blocks: Any = zip(whole.vit.blocks, statistics, strict=True)
    candidates = [block_candidates(block, moments) for block, moments in blocks]
    plan = recipe_ranks(calibrated.dense, candidates, calibrated.embedding, recipe)
    small = shrink(whole, candidates, calibrated.embedding, statistics, plan)
    compensate(calibrated, small, recipe, {}, NOWHERE)
    return small
