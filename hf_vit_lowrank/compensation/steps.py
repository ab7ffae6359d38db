"""What a recipe does to repair a model after it was made smaller, each step from the one before."""

from __future__ import annotations

import copy
import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import processes
from ..calibration import Calibrated, label_classes
from ..divergence import held_back_confidence, held_back_divergence
from ..embeddings import embedded_by, embedding_change
from ..errors import UserError
from ..out_of_memory import with_smaller_batches
from ..progress import track
from ..recipe import OURS, TRAINED, VIEWS, CompressionRecipe
from ..record import json_number
from ..remote.modeling_lowrank_vit import LowRankViTForImageClassification
from ..run_folder import RunFolder
from ..timing import timed
from .closed_form import compensate_closed_form
from .distill import distill
from .drift import block_drifts
from .gradient import BlockTraining, compensate_gradient

logger = logging.getLogger(__name__)

# Images on which the drift of each block is measured, for the report.
DRIFT_IMAGES = 64
# Held-back images that tell how sure a model is of itself.
FEWEST_IMAGES = 20
# Of the way from the weights before distillation to those behind it: half way, what was learnt by heart is halved as
# well, and what holds for other images may not be (as in Wortsman et al., arXiv 2109.01903).
WAY = (0.25, 0.5, 0.75, 1.0)


def compensate(
    calibrated: Calibrated,
    model: LowRankViTForImageClassification,
    recipe: CompressionRecipe,
    seconds: dict[str, float],
    run: RunFolder,
) -> dict[str, Any]:
    """Repair `model` in place, each step of `recipe.compensation` from the one before; what to report of it."""
    report: dict[str, Any] = {}
    if recipe.compensation == "none":
        return report
    shrunk = None
    if recipe.preset == OURS:
        shrunk = copy.deepcopy(model) if recipe.compensation in TRAINED else None
        with timed(seconds, "compensation"):
            refit(calibrated, model, run.part("closed-form"))
    if recipe.compensation in TRAINED:
        with timed(seconds, "gradient"):
            report["gradient"] = _train_blocks(calibrated, model, shrunk, recipe, run.part("gradient"))
    if recipe.compensation == "distill":
        with timed(seconds, "distillation"):
            report["distillation"] = _distill(calibrated, model, recipe, run.part("distillation"))
    return report


def measured_drifts(calibrated: Calibrated, model: LowRankViTForImageClassification) -> list[float]:
    """Of each block, six digits; on images that nothing was fitted on where there are some, in whichever process."""
    first = calibrated.fitting[0]
    batches = calibrated.held_back if processes.total(len(calibrated.held_back)) else calibrated.fitting
    own = DRIFT_IMAGES // processes.count()
    images = torch.cat([first[:0], *batches[: -(-own // len(first))]])[:own].split(len(first))
    return [float(f"{value:.6g}") for value in block_drifts(calibrated.dense.model, model, images)]


def _shared(calibrated: Calibrated, model: LowRankViTForImageClassification, batches: Sequence[Tensor]) -> list[Tensor]:
    """The smaller model's embeddings, from which the dense blocks start as well.

    What factors leave out of the patches does not matter there, and is nothing that the tokens read should pay for.
    """
    return embedded_by(model, calibrated.dense.model, batches)


def refit(calibrated: Calibrated, model: LowRankViTForImageClassification, run: RunFolder) -> None:
    """Refit `model` in place in closed form."""
    start, embeddings = copy.deepcopy(model.state_dict()), _shared(calibrated, model, calibrated.fitting)

    def attempt(size: int) -> None:
        model.load_state_dict(start)
        compensate_closed_form(calibrated.dense.model, model, calibrated.statistics, embeddings, size, run)

    with_smaller_batches("Compensation", attempt, calibrated.images_at_once)


def _train_blocks(
    calibrated: Calibrated,
    model: LowRankViTForImageClassification,
    shrunk: LowRankViTForImageClassification | None,
    recipe: CompressionRecipe,
    run: RunFolder,
) -> dict[str, Any]:
    """Train block by block; `model` stays as it is, but for its confidence, where the whole is no better on held-back
    images.

    shrunk: the model before its refit, from which training starts with refits of its own; None for other presets.
    """
    trained = copy.deepcopy(model) if shrunk is None else shrunk
    start = copy.deepcopy(trained.state_dict())

    held_back = _shared(calibrated, trained, calibrated.held_back)

    def train(size: int) -> list[BlockTraining]:
        trained.load_state_dict(start)
        return compensate_gradient(
            *(calibrated.dense.model, trained, calibrated.statistics),
            *(_training_embeddings(calibrated, trained, recipe), held_back),
            images=sum(map(len, calibrated.fitting)),
            batch_size=recipe.batch_size,
            size=size,
            refit=shrunk is not None,
            seed=recipe.seed,
            run=run,
        )

    records = with_smaller_batches("Training block by block", train, calibrated.images_at_once)
    if not any(record.kept for record in records):
        logger.warning("training made no block better on held-back images: all stay as they were refitted")
    confidences = [_match_confidence(calibrated, one) for one in (model, trained)]
    before, after = (held_back_divergence(calibrated, one) for one in (model, trained))
    kept = after < before
    if kept:
        model.load_state_dict(trained.state_dict())
    return {
        "before": before,
        "after": json_number(after),
        "kept": kept,
        "blocks": [{**asdict(record), "after": json_number(record.after)} for record in records],
        "confidence": confidences[kept],
    }


@torch.no_grad()
def _match_confidence(calibrated: Calibrated, model: LowRankViTForImageClassification) -> float:
    """Multiply the logits so that the model is as sure of itself as the dense one: errors of the stream and ridges make
    it less sure. Which class comes first stays the same. Returns the factor, 1 where few images are held back."""
    images = processes.total(sum(map(len, calibrated.held_back)))
    factor = held_back_confidence(calibrated, model) if images >= FEWEST_IMAGES else 1.0
    for head in (model.classifier, model.distillation_classifier):
        for parameter in [] if head is None else head.parameters():
            parameter.mul_(factor)
    return factor


@torch.no_grad()
def _training_embeddings(
    calibrated: Calibrated, model: LowRankViTForImageClassification, recipe: CompressionRecipe
) -> Tensor:
    """Embeddings by `model` of this process's images that may be fitted on, then of VIEWS random views of all such
    images: one tensor (images, tokens, d), filled batch by batch, since it is by far the largest of the run."""
    embed, change = calibrated.dense.model.vit.embeddings, embedding_change(model, calibrated.dense.model)
    fitting = int(processes.total(sum(map(len, calibrated.fitting))))
    views = processes.share(torch.arange(fitting).repeat(VIEWS).split(recipe.batch_size))
    generator = torch.Generator().manual_seed(recipe.seed + processes.index())
    embedded = (
        embed(calibrated.views.batch(chosen.tolist(), generator)).cpu()
        for chosen in track(views, "Views", sum(map(len, views)), size=len)
    )
    images, place = sum(map(len, [*calibrated.fitting, *views])), 0
    embeddings = torch.empty(images, *calibrated.fitting[0].shape[1:])
    for batch in chain(calibrated.fitting, embedded):
        embeddings[place : place + len(batch)] = change(batch)
        place += len(batch)
    return embeddings


def _distill(
    calibrated: Calibrated,
    model: LowRankViTForImageClassification,
    recipe: CompressionRecipe,
    run: RunFolder,
) -> dict[str, Any]:
    """Train the whole; `model` stays as it is where that is no better on held-back images."""
    views, held_back = calibrated.views, int(processes.total(sum(map(len, calibrated.held_back))))
    labels = _labels(calibrated) if recipe.labels else None
    start = copy.deepcopy(model.state_dict())
    before = held_back_divergence(calibrated, model)
    with tempfile.TemporaryDirectory() as temporary:

        def train(size: int) -> list[tuple[int, float]]:
            model.load_state_dict(start)
            return distill(
                calibrated.dense.model,
                model,
                views,
                range(len(views) - held_back, len(views)),
                epochs=recipe.distill_epochs,
                learning_rate=recipe.distill_lr,
                batch_size=recipe.batch_size,
                seed=recipe.seed,
                labels=labels,
                folder=run.folder or Path(temporary),
                images_at_once=size,
                gradient_checkpointing=recipe.gradient_checkpointing,
            )

        curve = with_smaller_batches("Distillation", train, calibrated.distilled_at_once or recipe.batch_size)
    share, after = _nearest_on_the_way(calibrated, model, start)
    kept = after < before
    if not kept:
        model.load_state_dict(start)
    if not all(math.isfinite(divergence) for _, divergence in curve):
        logger.warning("distillation came to numbers that are not finite: its rate %g is too high", recipe.distill_lr)
    return {
        "before": before,
        "after": json_number(after),
        "kept": kept,
        "share": share if kept else 0.0,
        "curve": [(seen, json_number(divergence)) for seen, divergence in curve],
    }


def _nearest_on_the_way(
    calibrated: Calibrated, model: LowRankViTForImageClassification, start: dict[str, Tensor]
) -> tuple[float, float]:
    """Leave `model` at that share of the way from `start` to its weights which is nearest to the dense model on
    held-back images; the share, and its divergence in the precision of the model, not in that of the Trainer."""
    end, divergences = copy.deepcopy(model.state_dict()), {}

    def go(share: float) -> None:
        model.load_state_dict({name: start[name].lerp(tensor, share) for name, tensor in end.items()})

    for share in WAY:
        go(share)
        divergences[share] = held_back_divergence(calibrated, model)
    nearest = min(WAY, key=lambda share: divergences[share] if math.isfinite(divergences[share]) else math.inf)
    go(nearest)
    return nearest, divergences[nearest]


def _labels(calibrated: Calibrated) -> list[int]:
    """The dense model's class of every calibration image."""
    images, class_of = calibrated.images, label_classes(calibrated.images, calibrated.dense.model)
    labels = [class_of(label) for label in calibrated.views.labels if label is not None]
    if len(labels) < len(calibrated.views):
        raise UserError(
            f"'{images.description['location']}' has no label for {len(calibrated.views) - len(labels)} of its images: "
            "label them, or leave labels out."
        )
    return labels
