"""How far the predictions of a model are from the dense model's, on images that nothing was fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from . import processes
from .bisection import last_that_fits
from .embeddings import embedded_by
from .remote.modeling_lowrank_vit import LowRankViTForImageClassification

if TYPE_CHECKING:
    from .calibration import Calibrated

# Between this and one over it a factor on the logits is looked for.
LARGEST_CONFIDENCE = 4.0


def held_back_agreement(calibrated: Calibrated, model: LowRankViTForImageClassification) -> float:
    """Share of the held-back images that a model and the dense model put into the same class."""
    logits = _held_back_logits(calibrated, model)
    return _mean_of_all((logits.argmax(-1) == calibrated.expected.argmax(-1)).double())


def held_back_divergence(calibrated: Calibrated, model: LowRankViTForImageClassification) -> float:
    """Kullback-Leibler divergence of a model's probabilities from the dense model's on held-back images, in nats."""
    return mean_divergence(_held_back_logits(calibrated, model), calibrated.expected)


def mean_divergence(logits: Tensor, expected: Tensor) -> float:
    """Of the probabilities that logits stand for from those that others do, (images, classes) both; over the images of
    all processes."""
    divergences = kl_div(logits.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none")
    return _mean_of_all(divergences.sum(-1))


def held_back_confidence(calibrated: Calibrated, model: LowRankViTForImageClassification) -> float:
    """The factor on a model's logits with which its probabilities are nearest to the dense model's on held-back images.

    Temperature scaling (Guo et al., arXiv 1706.04599) towards probabilities in place of labels. The divergence is
    convex in the factor, and its slope is how much larger the mean logit is under the model's probabilities.
    """
    logits, expected = _held_back_logits(calibrated, model), calibrated.expected.softmax(-1)

    def too_little(factor: float) -> bool:
        slope = (((factor * logits).softmax(-1) - expected) * logits).sum().item()
        return processes.total(slope) < 0

    return last_that_fits(too_little, 1 / LARGEST_CONFIDENCE, LARGEST_CONFIDENCE)


def _held_back_logits(calibrated: Calibrated, model: LowRankViTForImageClassification) -> Tensor:
    return stream_logits(model, embedded_by(model, calibrated.dense.model, calibrated.held_back))


def _mean_of_all(values: Tensor) -> float:
    """Over the images (images,) of all processes."""
    return processes.total(values.sum().item()) / processes.total(len(values))


@torch.no_grad()
def stream_logits(model: LowRankViTForImageClassification, stream: Sequence[Tensor], first_block: int = 0) -> Tensor:
    """(images, classes) in float64 on the CPU, from batches of what a block reads: embeddings, for the first one."""
    logits = []
    for batch in stream:
        tokens = batch.to(model.device)
        for block in model.vit.blocks[first_block:]:
            tokens, _ = block(tokens)
        logits.append(model.classify(model.vit.norm(tokens))[0].cpu().double())
    return torch.cat(logits) if logits else torch.empty(0, model.config.num_labels or 0, dtype=torch.float64)
