"""The story: checkpoint and images in, smaller checkpoint and a report of what it cost out."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import processes
from .bisection import last_that_fits
from .budget import recipe_limit, recipe_ranks
from .calibration import AGREEMENT_SHARE, NOWHERE, Calibrated, calibrate, training_share
from .charts import plan_chart
from .checkpoint import save_checkpoint
from .compensation.steps import compensate, measured_drifts
from .dense import not_finite
from .dense_layout import to_transformers
from .divergence import held_back_agreement
from .errors import RunError, UserError
from .expected_time import expected_seconds
from .hub import PushReport, push_folder
from .images import ImageStream
from .model_card import PICTURE, model_card
from .out_of_memory import with_smaller_batches
from .pivoting import pivoted
from .plan_costs import plan_cost
from .presets import PRESETS
from .probing import Weighed, probe_sizes
from .recipe import OURS, CompressionRecipe
from .record import built_size, compression_record, planned_size, published
from .remote.configuration_lowrank_vit import LowRankViTConfig
from .remote.modeling_lowrank_vit import LowRankViTForImageClassification
from .run_folder import RunFolder
from .surgery import shrink
from .timing import timed

logger = logging.getLogger(__name__)

# Of the search for --min-agreement, which thus ends within a hundredth of the parameters.
HALVINGS = 7


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
        record = published(self.report)
        save_checkpoint(
            self.model if record.get("remote_code", True) else to_transformers(self.model),
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
    calibrated = calibrate(
        *(source, calibration, recipe),
        hold_back=training_share(recipe),
        revision=revision,
        allow_pickle=allow_pickle,
        device=device,
    ).narrower(recipe)
    dense, candidates = calibrated.dense, calibrated.candidates
    size = planned_size(dense, candidates, recipe, recipe_ranks(dense, candidates, calibrated.embedding, recipe))
    report = compression_record(dense, calibrated.calibration, recipe, size)
    small = size["flops"] / plan_cost(dense.config, "flops")
    report["seconds"] = {
        **calibrated.seconds,
        **{f"{stage}, expected": taken for stage, taken in expected_seconds(recipe, small, calibrated.seconds).items()},
    }
    return report


def build(calibrated: Calibrated, recipe: CompressionRecipe, *, run: RunFolder = NOWHERE) -> CompressionResult:
    """One size from what was calibrated; with training in the recipe some images must have been held back.

    run: where finished stages are kept. Raises UserError where the size cannot be reached, RunError where the result is
    not finite.
    """
    calibrated = calibrated.narrower(recipe)
    dense = calibrated.dense
    seconds: dict[str, float] = {}
    probes = None
    if recipe.probe:
        with timed(seconds, "probes"):
            probes = run.stage("probes", lambda: probe_sizes(calibrated, recipe, run.part("probing")))
    with timed(seconds, "surgery"):
        config, state, size = run.stage("surgery", lambda: _smaller(calibrated, recipe, probes))
        model = LowRankViTForImageClassification(LowRankViTConfig.from_dict(config)).eval()
        model.load_state_dict(state)
        torch.nn.Module.to(model, dense.model.device)
    report = compression_record(calibrated.dense, calibrated.calibration, recipe, size)
    if probes is not None:
        report["probes"] = probes
    drift = {"before": measured_drifts(calibrated, model)}
    report.update(compensate(calibrated, model, recipe, seconds, run))
    if (name := not_finite(model)) is not None:
        raise RunError(f"{name} of the smaller model is not finite: the dense weights or activations are too large.")
    report["drift"] = {**drift, "after": measured_drifts(calibrated, model)}
    model.cpu()
    if recipe.preset == OURS and not recipe.native:
        with timed(seconds, "pivots"):
            model = pivoted(model)
    report["seconds"] = {**calibrated.seconds, **seconds}
    return CompressionResult(model, dense.image_processor, report, dense.preprocessor_config)


def _smaller(
    calibrated: Calibrated, recipe: CompressionRecipe, probes: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Configuration, weights and sizes of the smaller model, before any compensation."""
    if recipe.preset == OURS:
        candidates = calibrated.candidates
        if probes is not None:
            candidates = Weighed(candidates, probes["factors"])
        ranks = recipe_ranks(calibrated.dense, candidates, calibrated.embedding, recipe)
        model = shrink(calibrated.dense.model, candidates, calibrated.embedding, calibrated.statistics, ranks)
        size = planned_size(calibrated.dense, candidates, recipe, ranks)
    else:
        # Every process makes the whole: what a preset needs of the images is not always a sum over them.
        inputs, limit = calibrated.presets, recipe_limit(calibrated.dense, recipe)

        def make(size: int) -> LowRankViTForImageClassification:
            kept = inputs if size == inputs.images_at_once else replace(inputs, images_at_once=size)
            return PRESETS[recipe.preset](kept, limit)

        model = with_smaller_batches("The preset", make, inputs.images_at_once)
        processes.same_parameters(model)
        size = built_size(model)
    return model.config.to_dict(), model.state_dict(), size


def _smallest_agreeing(calibrated: Calibrated, recipe: CompressionRecipe, run: RunFolder) -> CompressionResult:
    """The largest reduction, by bisection, whose model keeps `min_agreement` of the dense predictions held back."""
    trials: list[dict[str, float]] = []
    seconds: dict[str, float] = {}
    wanted = recipe.min_agreement or 1.0
    images = int(processes.total(sum(map(len, calibrated.held_back))))
    if wanted < 1 and images * (1 - wanted) < 1:
        logger.warning(
            "%d images are held back, so that an agreement of %g is one of all of them: more samples tell more",
            *(images, wanted),
        )

    def attempt(reduction: float) -> tuple[CompressionResult, float]:
        size = replace(recipe, reduction=reduction, min_agreement=None)
        trial = build(calibrated, size, run=run.part(f"reduction-{reduction}"))
        for stage, taken in trial.report["seconds"].items():
            if stage not in calibrated.seconds:
                seconds[stage] = seconds.get(stage, 0.0) + taken
        with timed(seconds, "agreement"):
            agreement = held_back_agreement(calibrated, trial.model)
        trials.append({"reduction": reduction, "agreement": agreement})
        return trial, agreement

    best, _ = attempt(0.0)

    def agrees(reduction: float) -> bool:
        nonlocal best
        try:
            trial, agreement = attempt(round(reduction, 4))
        except UserError:  # below the smallest ranks
            return False
        best = trial if agreement >= wanted else best
        return agreement >= wanted

    last_that_fits(agrees, 0.0, 1.0, HALVINGS)
    report = {
        **best.report,
        "recipe": recipe.to_dict(),
        "seconds": {**calibrated.seconds, **seconds},
        "agreement": {
            "images": images,
            "wanted": wanted,
            "trials": trials,
        },
    }
    return replace(best, report=report)
