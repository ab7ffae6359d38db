"""The story: checkpoint and images in, smaller checkpoint and a report of what it cost out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .candidates.block import BlockCandidates, block_candidates
from .checkpoint import save_checkpoint
from .compensation.closed_form import compensate_closed_form
from .dense import DenseSource, dense_parameters, load_dense
from .errors import UserError
from .evaluation import pick_device
from .images import ImageStream, open_images, pixel_batches
from .model_card import model_card
from .progress import track
from .rank_plan import RankPlan, budgeted_ranks, plan_cost
from .recipe import CompressionRecipe
from .remote.modeling_lowrank_vit import LowRankViTForImageClassification
from .statistics import BlockStatistics, collect_statistics
from .surgery import shrink

# Share of the calibration images that --min-agreement holds back to measure on, and the step its search ends at.
HELD_BACK = 0.2
SMALLEST_STEP = 0.01


@dataclass(frozen=True)
class CompressionResult:
    """A compressed model, and the record of how it was made (JSON-able; it becomes compression.json and the card)."""

    model: LowRankViTForImageClassification
    image_processor: Any
    report: dict[str, Any]
    preprocessor_config: bytes | None = field(default=None, repr=False)

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write a checkpoint folder that loads with trust_remote_code wherever torch and transformers are.

        Raises UserError where the folder cannot be written to, RunError where writing failed (see `save_checkpoint`).
        """
        # Times differ from run to run; the same recipe must give the same bytes.
        record = {key: value for key, value in self.report.items() if key != "seconds"}
        save_checkpoint(
            self.model,
            self.image_processor,
            folder,
            record=record,
            card=model_card(record),
            preprocessor_config=self.preprocessor_config,
            overwrite=overwrite,
        )


@dataclass(frozen=True)
class Calibrated:
    """What any size is made from: the dense model, what the images told about it, and the images' embeddings.

    held_back, expected: embeddings of images that nothing is fitted on, and the dense model's classes for them, if some
        were asked for.
    """

    dense: DenseSource
    fitting: list[Tensor]
    held_back: list[Tensor]
    expected: Tensor
    statistics: list[BlockStatistics]
    candidates: list[BlockCandidates]
    calibration: dict[str, Any]
    seconds: dict[str, float]


def compress(
    source: str,
    calibration: str | ImageStream,
    recipe: CompressionRecipe,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    device: str | None = None,
) -> CompressionResult:
    """Compress a ViT/DeiT classifier (folder or hub id) by `recipe`, calibrated on images without labels.

    calibration: where the images are (see `open_images`), or an opened stream.

    Raises:
        UserError: a source, data set or target that cannot be used.
        RunError: the calibration data were empty or the model overflows on them.
    """
    measured = recipe.min_agreement is not None
    calibrated = calibrate(
        source, calibration, recipe, hold_back=measured, revision=revision, allow_pickle=allow_pickle, device=device
    )
    return _smallest_agreeing(calibrated, recipe) if measured else build(calibrated, recipe)


def plan(
    source: str,
    calibration: str | ImageStream,
    recipe: CompressionRecipe,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """The report of a compression that is not carried out: ranks, sizes, predicted loss; nothing is written.

    Raises UserError and RunError as `compress` does; a recipe with min_agreement is refused, since it must be built.
    """
    if recipe.min_agreement is not None:
        raise UserError(
            "A plan cannot tell agreement, which is measured on built models: use compress, or a reduction."
        )
    calibrated = calibrate(source, calibration, recipe, revision=revision, allow_pickle=allow_pickle, device=device)
    report = _report(calibrated, recipe, _ranks(calibrated, recipe))
    if recipe.compensation == "closed-form":
        # Measured between 0.7 and 1 times the statistics: both are a few passes over the same images.
        report["seconds"]["compensation, expected"] = report["seconds"]["statistics"]
    return report


def calibrate(
    source: str,
    calibration: str | ImageStream,
    recipe: CompressionRecipe,
    *,
    hold_back: bool = False,
    revision: str | None = None,
    allow_pickle: bool = False,
    device: str | None = None,
) -> Calibrated:
    """Everything that does not depend on the size: load, embed the images, collect statistics, draw the error curves.

    hold_back: set some images apart, to measure agreement on.
    """
    seconds: dict[str, float] = {}
    if isinstance(calibration, str):
        calibration = open_images(calibration, samples=recipe.samples, seed=recipe.seed)
    with _timed(seconds, "load"):
        dense = load_dense(source, revision=revision, allow_pickle=allow_pickle)
        dense.model.requires_grad_(False)
        torch.nn.Module.to(dense.model, pick_device(device))
        if recipe.min_agreement is None:
            _limit(dense, recipe)  # a model to match that cannot be read is found before the long work
    with _timed(seconds, "images"):
        held_back: list[Tensor] = []
        fitting = _embed(dense, calibration, recipe.batch_size)
        if hold_back:
            fitting, held_back = _split(fitting)
        expected = _predictions(dense.model, held_back)
    with _timed(seconds, "statistics"):
        batches = track(fitting, "Statistics", sum(map(len, fitting)), size=len)
        half = dense.model.device.type == "cuda" and torch.cuda.is_bf16_supported()
        precision = torch.bfloat16 if half else torch.float32
        statistics = collect_statistics(dense.model, batches, recipe.seed, precision)
    with _timed(seconds, "candidates"):
        blocks: Any = zip(dense.model.vit.blocks, statistics, strict=True)
        candidates = [
            block_candidates(*pair) for pair in track(blocks, "Error curves", len(dense.model.vit.blocks), "blocks")
        ]
    about = {**calibration.description, "images": sum(map(len, fitting + held_back)), "sha256": calibration.sha256}
    return Calibrated(dense, fitting, held_back, expected, statistics, candidates, about, seconds)


def build(calibrated: Calibrated, recipe: CompressionRecipe) -> CompressionResult:
    """One size from what was calibrated."""
    ranks = _ranks(calibrated, recipe)
    report = _report(calibrated, recipe, ranks)
    dense, seconds = calibrated.dense, report["seconds"]
    with _timed(seconds, "surgery"):
        model = shrink(dense.model, calibrated.candidates, calibrated.statistics, ranks)
    if recipe.compensation == "closed-form":
        with _timed(seconds, "compensation"):
            drifts = compensate_closed_form(dense.model, model, calibrated.statistics, calibrated.fitting)
        report["blocks"] = [asdict(drift) for drift in drifts]
    return CompressionResult(model.cpu(), dense.image_processor, report, dense.preprocessor_config)


def _ranks(calibrated: Calibrated, recipe: CompressionRecipe) -> RankPlan:
    config = calibrated.dense.model.config
    limit = _limit(calibrated.dense, recipe)
    return budgeted_ranks(calibrated.candidates, config, limit, recipe.cost, recipe.query_key_weight)


def _limit(dense: DenseSource, recipe: CompressionRecipe) -> int:
    """The most parameters or FLOPs that the recipe allows."""
    if recipe.max_parameters is not None:
        return recipe.max_parameters
    if recipe.match is not None:
        return dense_parameters(recipe.match)
    assert recipe.reduction is not None
    whole = dense.parameters if recipe.cost == "parameters" else plan_cost(dense.model.config, "flops")
    return int((1 - recipe.reduction) * whole)


def _report(calibrated: Calibrated, recipe: CompressionRecipe, ranks: RankPlan) -> dict[str, Any]:
    dense, config = calibrated.dense, ranks.apply(calibrated.dense.model.config)
    parameters = plan_cost(config, "parameters")
    return {
        "format": 1,
        "source": {
            "location": dense.location,
            "revision": dense.revision,
            "weights_sha256": dense.weights_sha256,
            "parameters": dense.parameters,
        },
        "recipe": recipe.to_dict(),
        "calibration": calibrated.calibration,
        "plan": {
            "query_key_ranks": ranks.query_key_ranks,
            "value_output_ranks": ranks.value_output_ranks,
            "mlp_widths": ranks.mlp_widths,
        },
        "dense_parameters": dense.parameters,
        "parameters": parameters,
        "reduction": 1 - parameters / dense.parameters,
        "dense_flops": plan_cost(dense.model.config, "flops"),
        "flops": plan_cost(config, "flops"),
        "predicted_loss": ranks.predicted_loss,
        "seconds": dict(calibrated.seconds),
        "versions": {name: version(name) for name in ("hf-vit-lowrank", "torch", "transformers")},
    }


@torch.no_grad()
def _embed(dense: DenseSource, images: ImageStream, batch_size: int) -> list[Tensor]:
    """Embeddings of all images, batches of (images, tokens, d), on the CPU; pixels are not needed after this."""
    batches = pixel_batches(images, dense.image_processor, batch_size)
    device = dense.model.device
    return [
        dense.model.vit.embeddings(batch.pixel_values.to(device)).cpu()
        for batch in track(batches, "Images", images.length, size=lambda batch: len(batch.pixel_values))
    ]


def _split(embeddings: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Images to fit on, and images held back to measure agreement on."""
    images = torch.cat(list(embeddings))
    held_back = max(1, int(HELD_BACK * len(images)))
    if held_back == len(images):
        raise UserError("Measuring agreement needs at least two calibration images: one to fit on, one held back.")
    size = len(embeddings[0])
    return list(images[:-held_back].split(size)), list(images[-held_back:].split(size))


def _smallest_agreeing(calibrated: Calibrated, recipe: CompressionRecipe) -> CompressionResult:
    """The largest reduction, by bisection, whose model keeps `min_agreement` of the dense predictions held back."""
    trials: list[dict[str, float]] = []
    wanted = recipe.min_agreement or 1.0

    def attempt(reduction: float) -> tuple[CompressionResult, float]:
        trial = build(calibrated, replace(recipe, reduction=reduction, min_agreement=None))
        agreement = held_back_agreement(calibrated, trial.model)
        trials.append({"reduction": reduction, "agreement": agreement})
        return trial, agreement

    best, _ = attempt(0.0)
    reached, missed = 0.0, 1.0
    while missed - reached > SMALLEST_STEP:
        middle = round((reached + missed) / 2, 4)
        try:
            trial, agreement = attempt(middle)
        except UserError:  # below the smallest ranks
            missed = middle
            continue
        if agreement >= wanted:
            best, reached = trial, middle
        else:
            missed = middle
    report = {
        **best.report,
        "recipe": recipe.to_dict(),
        "agreement": {"images": sum(map(len, calibrated.held_back)), "wanted": wanted, "trials": trials},
    }
    return replace(best, report=report)


def held_back_agreement(calibrated: Calibrated, model: LowRankViTForImageClassification) -> float:
    """Share of the held-back images that a model (on the CPU) and the dense model put into the same class."""
    torch.nn.Module.to(model, calibrated.dense.model.device)
    agreement = (_predictions(model, calibrated.held_back) == calibrated.expected).double().mean().item()
    model.cpu()
    return agreement


@torch.no_grad()
def _predictions(model: LowRankViTForImageClassification, embeddings: Sequence[Tensor]) -> Tensor:
    """The predicted class of every image, from batches of embeddings."""
    chosen = [torch.empty(0, dtype=torch.long)]
    for batch in embeddings:
        stream = batch.to(model.device)
        for block in model.vit.blocks:
            stream, _ = block(stream)
        chosen.append(model.classify(model.vit.norm(stream))[0].argmax(-1).cpu())
    return torch.cat(chosen)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
