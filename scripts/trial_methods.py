"""What `bench_trials.py` puts in place of parts of the method: each was tried, and is no better than what is there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from hf_vit_lowrank.augmentation import RandomViews
from hf_vit_lowrank.calibration import Calibrated
from hf_vit_lowrank.compensation import distill, gradient, steps
from hf_vit_lowrank.compensation.closed_form import compensate_closed_form
from hf_vit_lowrank.embeddings import embedded_by
from hf_vit_lowrank.linalg import ridge_solve
from hf_vit_lowrank.regression import NormalEquations
from hf_vit_lowrank.remote.modeling_lowrank_vit import LowRankViTForImageClassification
from hf_vit_lowrank.run_folder import RunFolder
from hf_vit_lowrank.surgery import set_linear

# Of training block by block; its updates are scaled to those of Adam.
MUON_RATE = 3e-3
# Directions of less than this share of the mean variance are drawn towards the prior as if they had it.
SMALLEST_SHARE = 1e-6
# Of the batches of views, how many are cut and pasted (CutMix), and how many are blended (mixup).
CUT, BLENDED = 0.4, 0.2

_Adam, _descend, _views = torch.optim.Adam, gradient._descend, RandomViews.batch
_compensate = steps.compensate


class MuonAndAdam(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the matrices, Adam for the rest."""

    def __init__(self, parameters: Iterable[Tensor], adam_rate: float, muon_rate: float = MUON_RATE):
        parameters = list(parameters)
        super().__init__(parameters, {})
        matrices = [parameter for parameter in parameters if parameter.ndim == 2]
        others = [parameter for parameter in parameters if parameter.ndim != 2]
        muon = torch.optim.Muon(matrices, muon_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self.parts = [muon, _Adam(others, adam_rate)]
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:
        for part in self.parts:
            part.step()


def descend_by_muon(block: Any, error: Any, examples: gradient._Examples, *rest: Any) -> None:
    """In place of `_descend` of training block by block; the last block, soon learnt by heart, stays with Adam."""
    is_last = isinstance(examples, gradient._Blends)
    with patch.object(torch.optim, "Adam", _Adam if is_last else MuonAndAdam):
        _descend(block, error, examples, *rest)


def distilled_by_muon(trainer: distill._Distiller, model: Any = None) -> torch.optim.Optimizer:
    """In place of `create_optimizer` of the Trainer."""
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    trainer.optimizer = MuonAndAdam(trained, *[trainer.args.learning_rate] * 2)
    return trainer.optimizer


def mixed_views(views: RandomViews, indices: Sequence[int], generator: torch.Generator) -> Tensor:
    """In place of `RandomViews.batch`: some batches get a rectangle of, or are blended with, themselves in reverse."""
    pixels = _views(views, indices, generator)
    kind, share, top, left = torch.rand(4, generator=generator).tolist()
    other = pixels.flip(0)
    if kind < CUT:
        height, width = (max(1, int(size * math.sqrt(1 - share))) for size in views.size)
        y, x = int(top * (views.size[0] - height + 1)), int(left * (views.size[1] - width + 1))
        pixels[..., y : y + height, x : x + width] = other[..., y : y + height, x : x + width]
        return pixels
    return share * pixels + (1 - share) * other if kind < CUT + BLENDED else pixels


def ridge_by_direction(power: float) -> Callable[[NormalEquations, float], Tensor]:
    """In place of `NormalEquations.solve`: a direction's ridge grows with this power of its variance, so that strong
    directions are drawn towards the prior as well as weak ones."""

    def solve(equations: NormalEquations, ridge: float) -> Tensor:
        variances, vectors = torch.linalg.eigh(equations.covariance)
        variances, mean = variances.clamp_min(0.0), equations.covariance.diagonal().mean()
        penalties = ridge * mean * (variances / mean).clamp_min(SMALLEST_SHARE) ** power
        return ((vectors / (variances + penalties)) @ (vectors.mT @ equations.cross)).mT

    return solve


def refit_on_views(count: int) -> Callable[..., None]:
    """In place of `steps.refit`: fit on so many random views of every image as well.

    All views of an image fall into the same half of the images, or its noise would look like knowledge.
    """

    def refit(calibrated: Calibrated, model: LowRankViTForImageClassification, run: RunFolder) -> None:
        images, size = torch.cat(calibrated.fitting), calibrated.images_at_once
        even = len(images) // 2 * 2
        embed, generator = calibrated.dense.model.vit.embeddings, torch.Generator().manual_seed(0)
        views = [
            embed(calibrated.views.batch(part.tolist(), generator))
            for _ in range(count)
            for part in torch.arange(even).split(size)
        ]
        embeddings = embedded_by(model, calibrated.dense.model, [*images[:even].split(size), *views])
        compensate_closed_form(calibrated.dense.model, model, calibrated.statistics, embeddings, size, run)

    return refit


def map_before_classifier(ridge: float) -> Callable[..., dict[str, Any]]:
    """In place of `compensate`, after which a linear map from what the classifier reads to what the dense one reads is
    fitted on the images and multiplied into the classifier's weight."""

    def compensate(calibrated: Calibrated, model: Any, *rest: Any) -> dict[str, Any]:
        report = _compensate(calibrated, model, *rest)
        _map_what_is_read(calibrated, model, ridge)
        return report

    return compensate


@torch.no_grad()
def _map_what_is_read(calibrated: Calibrated, model: Any, ridge: float) -> None:
    dense = calibrated.dense.model
    ours = _read(model, embedded_by(model, dense, calibrated.fitting))
    theirs = _read(dense, calibrated.fitting)
    centred, change = ours - ours.mean(0), theirs - theirs.mean(0) - (ours - ours.mean(0))
    covariance = centred.mT @ centred
    linear = torch.eye(len(covariance)) + ridge_solve(covariance, centred.mT @ change, ridge)
    weight, bias = dense.classifier.weight.double(), dense.classifier.bias.double()
    set_linear(model.classifier, weight @ linear, bias + weight @ (theirs.mean(0) - linear @ ours.mean(0)))
    steps._match_confidence(calibrated, model)


def _read(model: LowRankViTForImageClassification, embeddings: Sequence[Tensor]) -> Tensor:
    """What the classifier reads of batches of a model's own embeddings: float64 (images, d)."""
    states = []
    for batch in embeddings:
        for block in model.vit.blocks:
            batch, _ = block(batch)
        states.append(model.vit.norm(batch)[:, 0])
    return torch.cat(states).double()
