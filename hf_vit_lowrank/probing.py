"""What the size of every piece is worth once blocks are compensated, measured; by that, ranks are chosen again.

Error curves predict what one piece does to the dense model. How much of it refits repair, and what the blocks behind
make of the rest, differs from block to block by a factor of ten. So the model of the first plan is refitted, and each
of its pieces is made smaller and larger in turn, its block refitted again, and the divergence from the dense model's
probabilities measured, on images that the refits have seen as well: what is learnt by heart is much the same on both
sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import processes
from .budget import recipe_ranks
from .calibration import Calibrated
from .candidates.block import FREE, BlockCandidates
from .compensation.closed_form import refit_block
from .compensation.drift import moved, tokens_computed
from .compensation.steps import refit
from .divergence import mean_divergence, stream_logits
from .embeddings import embedded_by
from .out_of_memory import with_smaller_batches
from .progress import track
from .rank_plan import RankPlan
from .recipe import CompressionRecipe
from .remote.modeling_lowrank_vit import LowRankViTForImageClassification
from .run_folder import RunFolder
from .surgery import resized_block, shrink, shrink_block

# A piece is made smaller and larger by this share of the hidden size.
STEP = 1 / 8
# Images of all processes on which divergences are measured.
IMAGES = 300
# Curves are multiplied by at most this, and by no less than one over it.
LARGEST_FACTOR = 2.0
_PIECES = ("query_key_ranks", "value_output_ranks", "mlp_widths")


@dataclass(frozen=True)
class Weighed(Sequence[BlockCandidates]):
    """Candidates whose error curves are multiplied by factors; those of a block are fetched when they are asked for."""

    candidates: Sequence[BlockCandidates]
    factors: Sequence[Sequence[float]]

    def __len__(self) -> int:
        return len(self.candidates)

    def __getitem__(self, layer: Any) -> Any:
        return replace(self.candidates[layer], factors=tuple(self.factors[layer]))


def probe_sizes(calibrated: Calibrated, recipe: CompressionRecipe, run: RunFolder) -> dict[str, list[list[float]]]:
    """Per block, of query-key, value-output and width: "worth", measured over predicted, and "factors" on curves."""
    candidates = calibrated.candidates
    plan = recipe_ranks(calibrated.dense, candidates, calibrated.embedding, recipe)
    model = shrink(calibrated.dense.model, candidates, calibrated.embedding, calibrated.statistics, plan)
    refit(calibrated, model, run.part("closed-form"))
    prober = _Prober(calibrated, recipe, plan, model)
    worth = with_smaller_batches("Probes", lambda size: prober.measure(size, run), calibrated.images_at_once)
    return {"worth": worth, "factors": curve_factors(worth)}


def curve_factors(worth: Sequence[Sequence[float]]) -> list[list[float]]:
    """Of each block's curves, by how much more their sizes are worth than predicted: the root of the ratio to the
    median, since measurements are noisy, within `LARGEST_FACTOR`. All ones where the median size is worth nothing."""
    ratios = sorted(ratio for own in worth for ratio in own)
    middle = ratios[len(ratios) // 2]
    if not middle > 0:
        return [[1.0] * len(own) for own in worth]
    return [
        [min(max(max(ratio / middle, 0.0) ** 0.5, 1 / LARGEST_FACTOR), LARGEST_FACTOR) for ratio in own]
        for own in worth
    ]


@dataclass(frozen=True)
class _Prober:
    """model: that of `plan`, refitted."""

    calibrated: Calibrated
    recipe: CompressionRecipe
    plan: RankPlan
    model: LowRankViTForImageClassification

    @torch.no_grad()
    def measure(self, images_at_once: int, run: RunFolder) -> list[list[float]]:
        """By block and piece, how much the divergence falls from a smaller size to a larger one over how much the curve
        says; six digits."""
        dense = self.calibrated.dense.model
        fitting = self.calibrated.fitting
        streams = [embedded_by(self.model, dense, fitting)] * 2
        probes = -(-IMAGES // (processes.count() * len(fitting[0])))
        expected = stream_logits(dense, _parts(fitting[:probes], images_at_once))
        worth, layers = [], len(self.model.vit.blocks)
        for layer in track(range(layers), "Probing sizes", layers, "blocks"):
            own = run.stage(f"worth-{layer:02}", partial(self._worth, layer, streams, expected, probes, images_at_once))
            worth.append(own)
            blocks: Any = dense.vit.blocks[layer], self.model.vit.blocks[layer]
            queries = tokens_computed(dense.config, layer)
            streams = [
                moved(block, stream, queries, images_at_once) for block, stream in zip(blocks, streams, strict=True)
            ]
        return worth

    def _worth(
        self, layer: int, streams: list[list[Tensor]], expected: Tensor, probes: int, images_at_once: int
    ) -> list[float]:
        """Of each piece of a block. streams: the dense one and the smaller one before it, of whose batches the first
        `probes` are measured on. expected: the dense model's logits for these."""
        config, plan = self.calibrated.dense.model.config, self.plan
        candidate, moments = self.calibrated.candidates[layer], self.calibrated.statistics[layer]
        source: Any = self.calibrated.dense.model.vit.blocks[layer]
        queries = tokens_computed(config, layer)

        def divergence(plan: RankPlan) -> float:
            """With this block as another plan has it, refitted."""
            block = resized_block(source, plan.apply(config), layer)
            shrink_block(block, source, candidate, moments)
            both = list(streams[0]), list(streams[1])
            refit_block(source, block, moments, *both, queries, config.num_tokens_read, images_at_once)
            behind = moved(block, _parts(streams[1][:probes], images_at_once), queries)
            return mean_divergence(stream_logits(self.model, behind, layer + 1), expected)

        step, worth = max(int(STEP * config.hidden_size), 1), []
        curves = candidate.curves(FREE, self.recipe.query_key_weight, self.recipe.rank_multiple, plan.last_width)
        for piece, (size, curve) in enumerate(zip(plan.sizes(layer), curves, strict=True)):
            sizes = max(size - step, curve.sizes[0]), min(size + step, curve.largest)
            smaller, larger = (divergence(_with_size(plan, layer, candidate, piece, other)) for other in sizes)
            predicted = float(curve.errors[sizes[0]] - curve.errors[sizes[1]])
            worth.append(float(f"{(smaller - larger) / predicted:.6g}") if predicted > 0 else 0.0)
        return worth


def _parts(batches: Sequence[Tensor], size: int) -> list[Tensor]:
    """The same images in batches of at most `size`."""
    return [part for batch in batches for part in batch.split(size)]


def _with_size(plan: RankPlan, layer: int, candidates: BlockCandidates, piece: int, size: int) -> RankPlan:
    """The plan with another size of one piece."""
    own: Any = (candidates.query_key.head_ranks, candidates.value_output.head_ranks, int)[piece](size)
    sizes = list(getattr(plan, _PIECES[piece]))
    sizes[layer] = own
    changed: dict[str, Any] = {_PIECES[piece]: sizes}
    if _PIECES[piece] == "mlp_widths":
        # Of all units nothing is left for a bypass to stand in for, and of few none are made of others.
        whole, ranks = size == len(candidates.width.order), plan.up_ranks or [0] * len(sizes)
        changed["bypass_ranks"] = _without(plan.bypass_ranks, layer if whole else None)
        changed["up_ranks"] = _without(ranks, layer if whole or size <= ranks[layer] else None)
    return replace(plan, **changed)


def _without(ranks: Sequence[int], layer: int | None) -> list[int]:
    """The same with 0 for a layer, if one is given."""
    return [0 if other == layer else rank for other, rank in enumerate(ranks)]
