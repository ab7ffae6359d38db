"""The story: checkpoint and images in, smaller checkpoint and a report of what it cost out."""

from __future__ import annotations

import copy
import hashlib
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from . import processes
from .augmentation import RandomViews
from .candidates.block import BlockCandidates, block_candidates
from .charts import plan_chart
from .checkpoint import save_checkpoint
from .compensation.closed_form import BlockDrift, compensate_closed_form
from .compensation.distill import distill
from .compensation.drift import block_drifts
from .compensation.gradient import BlockTraining, compensate_gradient
from .dense import DenseSource, dense_parameters, load_dense, not_finite, to_transformers
from .errors import RunError, UserError
from .evaluation import class_of_label, count_flops, count_parameters, pick_device
from .hub import PushReport, push_folder
from .images import ImageStream, Share, open_images, pixel_batches
from .memory import memory_plan
from .model_card import PICTURE, model_card
from .out_of_memory import with_smaller_batches
from .precision import half_precision
from .presets import PRESETS, smallest_parameters
from .presets.inputs import PresetInputs
from .progress import say, track
from .rank_plan import RankPlan, budgeted_ranks, curve_records, plan_cost, smallest_config, unreachable
from .recipe import OURS, CompressionRecipe
from .remote.configuration_lowrank_vit import LowRankViTConfig
from .remote.modeling_lowrank_vit import LowRankViTForImageClassification, pair
from .run_folder import RunFolder
from .statistics import BlockStatistics, collect_statistics
from .surgery import shrink

logger = logging.getLogger(__name__)

# Share of the calibration images held back: to measure agreement on, and to decide what training may keep.
AGREEMENT_SHARE = 0.2
TRAINING_SHARE = 0.1
# The step that the search for --min-agreement ends at.
SMALLEST_STEP = 0.01
# Random views of every calibration image beside the image itself, for training block by block.
VIEWS = 2
TRAINED = ("gradient", "distill")
NOWHERE = RunFolder()
# Images on which the drift of each block is measured, for the report.
DRIFT_IMAGES = 128


@dataclass(frozen=True)
class CompressionResult:
    """A compressed model, and the record of how it was made (JSON-able; it becomes compression.json and the card).

    The model is of this package's layout also where the recipe is native: it is rewritten when it is saved.
    """

    model: LowRankViTForImageClassification
    image_processor: Any
    report: dict[str, Any]
    preprocessor_config: bytes | None = field(default=None, repr=False)

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write a checkpoint folder that loads with trust_remote_code wherever torch and transformers are; that of a
        native recipe loads without.

        Of several processes the main one writes.

        Raises UserError where the folder cannot be written to, RunError where writing failed (see `save_checkpoint`).
        """
        if not processes.is_main():
            return
        # Times differ from run to run; the same recipe must give the same bytes.
        record = {key: value for key, value in self.report.items() if key != "seconds"}
        save_checkpoint(
            self.model if record["remote_code"] else to_transformers(self.model),
            self.image_processor,
            folder,
            record=record,
            card=model_card(record, picture=PICTURE),
            preprocessor_config=self.preprocessor_config,
            pictures={PICTURE: plan_chart(record["plan"])},
            overwrite=overwrite,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        token: str | None = None,
    ) -> PushReport | None:
        """Save to a temporary folder and push that whole, as `hub.push_folder` does, which says what the arguments are.

        The same call again finishes a push that was interrupted: the same result has the same bytes. Of several
        processes the main one pushes, and the others get None.
        """
        if not processes.is_main():
            return None
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "checkpoint"
            self.save_pretrained(folder)
            return push_folder(folder, repo_id, private=private, revision=revision, create_pr=create_pr, token=token)


@dataclass(frozen=True)
class Calibrated:
    """What any size is made from: the dense model, what the images told about it, and the images' embeddings.

    native: whether the candidates are for a plan that transformers' own classes can hold.
    held_back, expected: embeddings of images that nothing is fitted on, the last of the stream, and the dense model's
        logits for them, if some were asked for.
    """

    dense: DenseSource
    images: ImageStream
    fitting: list[Tensor]
    held_back: list[Tensor]
    expected: Tensor
    statistics: Sequence[BlockStatistics]
    calibration: dict[str, Any]
    seed: int
    native: bool
    seconds: dict[str, float]
    parking: RunFolder = NOWHERE

    @cached_property
    def candidates(self) -> Sequence[BlockCandidates]:
        """Error curves and what they come from, one per block; on disk where memory is limited."""
        layers = range(self.dense.model.config.num_hidden_layers)
        with _timed(self.seconds, "candidates"):
            own = processes.share(layers)
            blocks = track(own, "Error curves", len(own), "blocks")
            if self.parking is NOWHERE:
                shares = processes.gather([self._candidates(layer) for layer in blocks])
                return [shares[layer % len(shares)][layer // len(shares)] for layer in layers]
            for layer in blocks:
                self.parking.stage(f"candidates-{layer}", partial(self._candidates, layer))
            return self.parking.parked([f"candidates-{layer}" for layer in layers])

    def _candidates(self, layer: int) -> BlockCandidates:
        block: Any = self.dense.model.vit.blocks[layer]
        return block_candidates(block, self.statistics[layer], self.native)

    @cached_property
    def presets(self) -> PresetInputs:
        """What the other methods are built from."""
        return PresetInputs(self.dense.model, self.fitting, self.statistics, self.seed)

    @cached_property
    def views(self) -> RandomViews:
        """All images, the held-back ones last; decoded when first asked for."""
        return RandomViews(self.images, self.dense.image_processor, pair(self.dense.model.config.image_size))


def compress(
    source: str,
    calibration: str | ImageStream,
    recipe: CompressionRecipe,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    device: str | None = None,
    run_folder: Path | None = None,
    memory_limit: int | None = None,
) -> CompressionResult:
    """Compress a ViT/DeiT classifier (folder or hub id) by `recipe`, calibrated on images without labels.

    calibration: where the images are (see `open_images`), or an opened stream. run_folder: where finished stages are
    kept, from which the same call goes on if it died, with the same bits in the end; it is the caller's to delete.
    None keeps nothing. memory_limit: bytes that the process may take; the moments of the blocks are then collected in
    groups by several passes and parked in `run_folder`, which is needed.

    Raises:
        UserError: a source, data set, target or limit that cannot be used; a `run_folder` of a run with other inputs.
        RunError: the calibration data were empty or the model overflows on them.
    """
    processes.join()
    measured = recipe.min_agreement is not None
    share = AGREEMENT_SHARE if measured else training_share(recipe)
    run = RunFolder(run_folder)
    calibrated = calibrate(
        source,
        calibration,
        recipe,
        hold_back=share,
        revision=revision,
        allow_pickle=allow_pickle,
        device=device,
        run=run,
        memory_limit=memory_limit,
    )
    if measured:
        return _smallest_agreeing(calibrated, recipe, run)
    return build(calibrated, recipe, run=run)


def training_share(recipe: CompressionRecipe) -> float:
    """Share of the calibration images that a recipe holds back to decide what training may keep; 0 without training."""
    return TRAINING_SHARE if recipe.compensation in TRAINED else 0.0


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
    if recipe.preset != OURS:
        raise UserError(f"A plan is made by preset '{OURS}' only: use compress for '{recipe.preset}'.")
    calibrated = calibrate(source, calibration, recipe, revision=revision, allow_pickle=allow_pickle, device=device)
    ranks = _ranks(calibrated, recipe)
    report = _report(calibrated, recipe, _planned_size(calibrated, recipe, ranks))
    if recipe.compensation != "none":
        # Measured between 0.7 and 1 times the statistics: both are a few passes over the same images.
        report["seconds"]["closed form, expected"] = report["seconds"]["statistics"]
    return report


def calibrate(
    source: str,
    calibration: str | ImageStream,
    recipe: CompressionRecipe,
    *,
    hold_back: float = 0.0,
    revision: str | None = None,
    allow_pickle: bool = False,
    device: str | None = None,
    run: RunFolder = NOWHERE,
    memory_limit: int | None = None,
) -> Calibrated:
    """Everything that does not depend on the size: load, embed the images, collect statistics, draw the error curves.

    hold_back: share of the images to set apart, which nothing is fitted on.
    """
    seconds: dict[str, float] = {}
    if isinstance(calibration, str):
        calibration = open_images(calibration, samples=recipe.samples, seed=recipe.seed)
    with _timed(seconds, "load"):
        dense = load_dense(source, revision=revision, allow_pickle=allow_pickle)
        dense.model.requires_grad_(False)
        torch.nn.Module.to(dense.model, processes.device() if processes.count() > 1 else pick_device(device))
        if recipe.min_agreement is None:
            _check_reachable(dense, recipe)  # before the long work
    if memory_limit is not None and run.folder is None:
        raise UserError("A memory limit needs a run folder, where the moments are parked.")
    if memory_limit is not None and processes.count() > 1:
        raise UserError("A memory limit is for one process: start it without accelerate launch.")
    memory = memory_plan(dense.model.config, recipe.samples, recipe.batch_size, memory_limit)
    say(f"Memory: about {memory.peak / 1e9:.1f} GB, {memory.passes} passes over the images for the statistics")
    run.require(
        recipe=recipe.to_dict(),
        source=_source(dense),
        images=calibration.description,
        versions=_versions(),
        device=dense.model.device.type,
        processes=processes.count(),
    )
    with _timed(seconds, "images"):
        own = calibration
        if processes.count() > 1:
            own = calibration.shared(Share(processes.index(), processes.count(), recipe.batch_size))
        fitting, held_back = _split(_embed(dense, own, recipe.batch_size), hold_back, recipe.batch_size)
        expected = _logits(dense.model, held_back)
    image_sha256 = _joint_sha256(own)
    run.require(image_sha256=image_sha256)
    with _timed(seconds, "statistics"):
        statistics: Sequence[BlockStatistics]
        if memory_limit is None:
            statistics = run.stage("statistics", lambda: _statistics(dense, fitting, recipe.seed, None))
            parking = NOWHERE
        else:
            parking = run.part("blocks")
            fitting = [part for batch in fitting for part in batch.split(memory.batch_size)]
            statistics = _parked_statistics(dense, fitting, recipe.seed, memory.group, parking)
    about = {
        **calibration.description,
        "images": int(processes.total(sum(map(len, fitting + held_back)))),
        "sha256": image_sha256,
        "skipped": list(own.skipped),
        "processes": processes.count(),
    }
    return Calibrated(
        *(dense, calibration, fitting, held_back, expected, statistics, about),
        seed=recipe.seed,
        native=recipe.native,
        seconds=seconds,
        parking=parking,
    )


def _parked_statistics(
    dense: DenseSource, embeddings: list[Tensor], seed: int, group: int, parking: RunFolder
) -> Sequence[BlockStatistics]:
    """Collected for `group` blocks at a time, and read from disk whenever they are needed."""
    layers = range(dense.model.config.num_hidden_layers)
    for start in layers[::group]:
        chosen = layers[start : start + group]
        if not all(parking.has(f"statistics-{layer}") for layer in chosen):
            for layer, moments in zip(chosen, _statistics(dense, embeddings, seed, chosen), strict=True):
                parking.save(f"statistics-{layer}", moments)
    return parking.parked([f"statistics-{layer}" for layer in layers])


def _statistics(dense: DenseSource, embeddings: list[Tensor], seed: int, layers: range | None) -> list[BlockStatistics]:
    half = dense.model.device.type == "cuda" and half_precision(dense.model.device)

    def collect(batches: list[Tensor]) -> list[BlockStatistics]:
        tracked = track(batches, "Statistics", sum(map(len, batches)), size=len)
        return collect_statistics(dense.model, tracked, seed, torch.bfloat16 if half else torch.float32, layers)

    return with_smaller_batches("Statistics", collect, embeddings)


def build(calibrated: Calibrated, recipe: CompressionRecipe, *, run: RunFolder = NOWHERE) -> CompressionResult:
    """One size from what was calibrated; with training in the recipe some images must have been held back.

    run: where finished stages are kept. Raises UserError where the size cannot be reached, RunError where the result is
    not finite.
    """
    dense = calibrated.dense
    seconds: dict[str, float] = {}
    with _timed(seconds, "surgery"):
        config, state, size = run.stage("surgery", lambda: _smaller(calibrated, recipe))
        model = LowRankViTForImageClassification(LowRankViTConfig.from_dict(config)).eval()
        model.load_state_dict(state)
        torch.nn.Module.to(model, dense.model.device)
    report = _report(calibrated, recipe, size)
    drift = {"before": _drifts(calibrated, model)}
    report.update(_compensate(calibrated, model, recipe, seconds, run))
    if (name := not_finite(model)) is not None:
        raise RunError(f"{name} of the smaller model is not finite: the dense weights or activations are too large.")
    report["drift"] = {**drift, "after": _drifts(calibrated, model)}
    report["seconds"] = {**calibrated.seconds, **seconds}
    return CompressionResult(model.cpu(), dense.image_processor, report, dense.preprocessor_config)


def _smaller(
    calibrated: Calibrated, recipe: CompressionRecipe
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Configuration, weights and sizes of the smaller model, before any compensation."""
    if recipe.preset == OURS:
        ranks = _ranks(calibrated, recipe)
        model = shrink(calibrated.dense.model, calibrated.candidates, calibrated.statistics, ranks)
        size = _planned_size(calibrated, recipe, ranks)
    else:
        if processes.count() > 1:
            raise UserError(f"Preset '{recipe.preset}' runs in one process: start it without accelerate launch.")
        model = PRESETS[recipe.preset](calibrated.presets, _limit(calibrated.dense, recipe))
        size = _built_size(model)
    return model.config.to_dict(), model.state_dict(), size


def _drifts(calibrated: Calibrated, model: LowRankViTForImageClassification) -> list[float]:
    """Of each block, six digits; on images that nothing was fitted on where there are some, in whichever process."""
    first = calibrated.fitting[0]
    batches = calibrated.held_back if processes.total(len(calibrated.held_back)) else calibrated.fitting
    own = DRIFT_IMAGES // processes.count()
    images = torch.cat([first[:0], *batches[: -(-own // len(first))]])[:own].split(len(first))
    return [float(f"{value:.6g}") for value in block_drifts(calibrated.dense.model, model, images)]


def _compensate(
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
        with _timed(seconds, "compensation"):
            drifts = _refit(calibrated, model, run.part("closed-form"))
        report["blocks"] = [asdict(drift) for drift in drifts]
    if recipe.compensation in TRAINED:
        with _timed(seconds, "gradient"):
            report["gradient"] = _train_blocks(calibrated, model, shrunk, recipe, run.part("gradient"))
    if recipe.compensation == "distill":
        with _timed(seconds, "distillation"):
            report["distillation"] = _distill(calibrated, model, recipe, run.part("distillation"))
    return report


def _refit(calibrated: Calibrated, model: LowRankViTForImageClassification, run: RunFolder) -> list[BlockDrift]:
    start = copy.deepcopy(model.state_dict())

    def refit(batches: list[Tensor]) -> list[BlockDrift]:
        model.load_state_dict(start)
        return compensate_closed_form(calibrated.dense.model, model, calibrated.statistics, batches, run)

    return with_smaller_batches("Compensation", refit, calibrated.fitting)


def _train_blocks(
    calibrated: Calibrated,
    model: LowRankViTForImageClassification,
    shrunk: LowRankViTForImageClassification | None,
    recipe: CompressionRecipe,
    run: RunFolder,
) -> dict[str, Any]:
    """Train block by block; `model` stays as it is where the whole is no better on held-back images.

    shrunk: the model before its refit, from which training starts with refits of its own; None for other presets.
    """
    trained = copy.deepcopy(model) if shrunk is None else shrunk
    start = copy.deepcopy(trained.state_dict())

    def train(batches: list[Tensor]) -> list[BlockTraining]:
        trained.load_state_dict(start)
        return compensate_gradient(
            *(calibrated.dense.model, trained, calibrated.statistics, batches, calibrated.held_back),
            refit=shrunk is not None,
            seed=recipe.seed,
            run=run,
        )

    embeddings = calibrated.fitting + _view_embeddings(calibrated, recipe)
    records = with_smaller_batches("Training block by block", train, embeddings)
    if not any(record.kept for record in records):
        logger.warning("training made no block better on held-back images: all stay as they were refitted")
    before, after = (held_back_divergence(calibrated, one) for one in (model, trained))
    if after < before:
        model.load_state_dict(trained.state_dict())
    return {
        "before": before,
        "after": after,
        "kept": after < before,
        "blocks": [asdict(record) for record in records],
    }


@torch.no_grad()
def _view_embeddings(calibrated: Calibrated, recipe: CompressionRecipe) -> list[Tensor]:
    """VIEWS random views of every image that may be fitted on, embedded."""
    embed, device = calibrated.dense.model.vit.embeddings, calibrated.dense.model.device
    fitting = int(processes.total(sum(map(len, calibrated.fitting))))
    images = processes.share(torch.arange(fitting).repeat(VIEWS).split(recipe.batch_size))
    generator = torch.Generator().manual_seed(recipe.seed + processes.index())
    return [
        embed(calibrated.views.batch(chosen.tolist(), generator).to(device)).cpu()
        for chosen in track(images, "Views", sum(map(len, images)), size=len)
    ]


def _distill(
    calibrated: Calibrated,
    model: LowRankViTForImageClassification,
    recipe: CompressionRecipe,
    run: RunFolder,
) -> dict[str, Any]:
    views, held_back = calibrated.views, int(processes.total(sum(map(len, calibrated.held_back))))
    with tempfile.TemporaryDirectory() as temporary:
        record = distill(
            calibrated.dense.model,
            model,
            views,
            range(len(views) - held_back, len(views)),
            epochs=recipe.distill_epochs,
            learning_rate=recipe.distill_lr,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            labels=_labels(calibrated) if recipe.labels else None,
            folder=run.folder or Path(temporary),
        )
    return asdict(record)


def _labels(calibrated: Calibrated) -> list[int]:
    """The dense model's class of every calibration image."""
    images, class_of = calibrated.images, class_of_label(calibrated.images, calibrated.dense.model)
    labels = [class_of(label) for label in calibrated.views.labels if label is not None]
    if len(labels) < len(calibrated.views):
        raise UserError(
            f"'{images.description['location']}' has no label for {len(calibrated.views) - len(labels)} of its images: "
            "name the label column, or leave labels out."
        )
    return labels


def _ranks(calibrated: Calibrated, recipe: CompressionRecipe) -> RankPlan:
    config = calibrated.dense.model.config
    limit = _limit(calibrated.dense, recipe)
    return budgeted_ranks(
        *(calibrated.candidates, config, limit, recipe.cost, recipe.query_key_weight),
        multiple=recipe.rank_multiple,
        native=recipe.native,
    )


def _limit(dense: DenseSource, recipe: CompressionRecipe) -> int:
    """The most parameters or FLOPs that the recipe allows."""
    in_flops = recipe.cost == "flops"
    return _allowed(recipe, plan_cost(dense.model.config, "flops", recipe.native) if in_flops else dense.parameters)


def _allowed(recipe: CompressionRecipe, whole: int) -> int:
    if recipe.max_parameters is not None:
        return recipe.max_parameters
    if recipe.match is not None:
        return dense_parameters(recipe.match)
    assert recipe.reduction is not None
    return int((1 - recipe.reduction) * whole)


def weight_bytes(source: str, recipe: CompressionRecipe, *, revision: str | None = None) -> int:
    """Bytes that the weights will take on disk, by the source's configuration alone; 0 where only the run can tell.

    Raises UserError where the source, or the model to match, cannot be used.
    """
    whole = dense_parameters(source, revision=revision)
    if recipe.min_agreement is not None or recipe.cost != "parameters":
        return 0
    return 4 * min(whole, _allowed(recipe, whole))


def _check_reachable(dense: DenseSource, recipe: CompressionRecipe) -> None:
    if recipe.preset == OURS:
        multiple = 1 if recipe.native else recipe.rank_multiple
        smallest = plan_cost(smallest_config(dense.model.config, multiple), recipe.cost, recipe.native)
    else:
        smallest = smallest_parameters(recipe.preset, dense.model)
    if (limit := _limit(dense, recipe)) < smallest:
        raise unreachable(limit, recipe.cost, smallest)


def _report(calibrated: Calibrated, recipe: CompressionRecipe, size: dict[str, Any]) -> dict[str, Any]:
    dense = calibrated.dense
    return {
        "format": 1,
        "source": {**_source(dense), "parameters": dense.parameters, "card": dense.card},
        "recipe": recipe.to_dict(),
        "calibration": calibrated.calibration,
        "dense_parameters": dense.parameters,
        "dense_flops": plan_cost(dense.model.config, "flops", recipe.native),
        "remote_code": not recipe.native,
        **size,
        "reduction": 1 - size["parameters"] / dense.parameters,
        "seconds": dict(calibrated.seconds),
        "versions": _versions(),
    }


def _source(dense: DenseSource) -> dict[str, Any]:
    return {"location": dense.location, "revision": dense.revision, "weights_sha256": dense.weights_sha256}


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("hf-vit-lowrank", "torch", "transformers")}


def _planned_size(calibrated: Calibrated, recipe: CompressionRecipe, ranks: RankPlan) -> dict[str, Any]:
    dense = calibrated.dense.model.config
    config = ranks.apply(dense)
    return {
        "plan": _inner_sizes(config),
        "parameters": plan_cost(config, "parameters", recipe.native),
        "flops": plan_cost(config, "flops", recipe.native),
        "predicted_loss": ranks.predicted_loss,
        "moment_ranks": [block.moment_ranks for block in calibrated.candidates],
        "error_curves": curve_records(calibrated.candidates, recipe.query_key_weight, recipe.rank_multiple, ranks),
    }


def _built_size(model: LowRankViTForImageClassification) -> dict[str, Any]:
    return {
        "plan": _inner_sizes(model.config),
        "parameters": count_parameters(model),
        "flops": count_flops(model),
        "predicted_loss": None,
    }


def _inner_sizes(config: LowRankViTConfig) -> dict[str, Any]:
    return {
        "query_key_ranks": config.query_key_ranks,
        "value_output_ranks": config.value_output_ranks,
        "mlp_widths": config.mlp_widths,
        "factor_ranks": config.factor_ranks,
        "bypass_ranks": config.bypass_ranks,
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


def _split(embeddings: list[Tensor], share: float, batch_size: int) -> tuple[list[Tensor], list[Tensor]]:
    """This process's images to fit on, and of those held back, which are the last of all processes' together."""
    images = int(processes.total(sum(map(len, embeddings))))
    fitted_on = images - (max(1, int(share * images)) if share else 0)
    fitting: list[Tensor] = []
    held_back: list[Tensor] = []
    for number, batch in enumerate(embeddings):
        start = (number * processes.count() + processes.index()) * batch_size
        for part, of in (
            (batch[: max(fitted_on - start, 0)], fitting),
            (batch[max(fitted_on - start, 0) :], held_back),
        ):
            if len(part):
                of.append(part)
    if min(processes.gather(len(fitting))) == 0:
        raise UserError(
            f"{images} calibration images are too few for this recipe in {processes.count()} process(es): each needs a "
            "batch to fit on, and training or --min-agreement others to measure on."
        )
    return fitting, held_back


def _joint_sha256(images: ImageStream) -> str | None:
    shares = processes.gather(images.sha256)
    return shares[0] if len(shares) == 1 else hashlib.sha256("".join(map(str, shares)).encode()).hexdigest()


def _smallest_agreeing(calibrated: Calibrated, recipe: CompressionRecipe, run: RunFolder) -> CompressionResult:
    """The largest reduction, by bisection, whose model keeps `min_agreement` of the dense predictions held back."""
    trials: list[dict[str, float]] = []
    wanted = recipe.min_agreement or 1.0

    def attempt(reduction: float) -> tuple[CompressionResult, float]:
        size = replace(recipe, reduction=reduction, min_agreement=None)
        trial = build(calibrated, size, run=run.part(f"reduction-{reduction}"))
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
        "agreement": {
            "images": int(processes.total(sum(map(len, calibrated.held_back)))),
            "wanted": wanted,
            "trials": trials,
        },
    }
    return replace(best, report=report)


def held_back_agreement(calibrated: Calibrated, model: LowRankViTForImageClassification) -> float:
    """Share of the held-back images that a model and the dense model put into the same class."""
    logits = _logits(model, calibrated.held_back)
    return _mean_of_all((logits.argmax(-1) == calibrated.expected.argmax(-1)).double())


def held_back_divergence(calibrated: Calibrated, model: LowRankViTForImageClassification) -> float:
    """Kullback-Leibler divergence of a model's probabilities from the dense model's on held-back images, in nats."""
    logits = _logits(model, calibrated.held_back).log_softmax(-1)
    divergences = kl_div(logits, calibrated.expected.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    return _mean_of_all(divergences)


def _mean_of_all(values: Tensor) -> float:
    """Over the images (images,) of all processes."""
    return processes.total(values.sum().item()) / processes.total(len(values))


@torch.no_grad()
def _logits(model: LowRankViTForImageClassification, embeddings: Sequence[Tensor]) -> Tensor:
    """(images, classes) in float64 on the CPU, from batches of embeddings."""
    logits = []
    for batch in embeddings:
        stream = batch.to(model.device)
        for block in model.vit.blocks:
            stream, _ = block(stream)
        logits.append(model.classify(model.vit.norm(stream))[0].double().cpu())
    return torch.cat(logits) if logits else torch.empty(0, model.config.num_labels or 0, dtype=torch.float64)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
