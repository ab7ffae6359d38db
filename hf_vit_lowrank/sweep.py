"""Many sizes from one pass of statistics: a table and a chart of what each size costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .calibration import AGREEMENT_SHARE, Calibrated, calibrate, training_share
from .charts import size_chart
from .compress import build
from .divergence import held_back_agreement
from .errors import UserError
from .evaluation import class_of_label, count_flops, evaluate_classifier
from .images import ImageStream
from .recipe import CompressionRecipe
from .remote.modeling_lowrank_vit import LowRankViTForImageClassification
from .run_folder import RunFolder

_COLUMNS = {
    "reduction": "removed",
    "parameters": "parameters",
    "bytes": "bytes",
    "flops": "FLOPs",
    "agreement": "agreement %",
    "top1": "top-1 %",
    "top5": "top-5 %",
}


def sweep(
    source: str,
    calibration: str | ImageStream,
    reductions: Sequence[float],
    recipe: CompressionRecipe,
    *,
    output: str | Path,
    dataset: ImageStream | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    device: str | None = None,
    run_folder: Path | None = None,
) -> list[dict[str, Any]]:
    """Compress by each of `reductions` (the one in `recipe` does not count), measure, and write what came out.

    Without `dataset` the agreement is measured on calibration images that are held back. Writes sweep.json, sweep.md
    and sweep.png into `output`; returns one row per size, the dense model first. run_folder: where finished stages and
    sizes are kept, from which the same call goes on if it died; it is the caller's to delete. None keeps nothing.

    Raises UserError and RunError as `compress` does.
    """
    if not reductions:
        raise UserError("A sweep needs at least one reduction.")
    run = RunFolder(run_folder)
    run.require(reductions=list(reductions), dataset=dataset.description if dataset else None)
    hold_back = training_share(recipe) or (AGREEMENT_SHARE if dataset is None else 0.0)
    calibrated = calibrate(
        source,
        calibration,
        replace(recipe, reduction=max(reductions)),  # what cannot be reached is refused before the long work
        hold_back=hold_back,
        revision=revision,
        allow_pickle=allow_pickle,
        device=device,
        run=run,
    )
    dense = calibrated.dense
    if dataset is not None and dataset.description["label_column"] is not None:
        class_of_label(dataset, dense.model)  # classes that cannot be matched are refused before a size is built

    def measured(size: float) -> tuple[dict[str, Any], dict[str, float | None]]:
        name = f"reduction-{size}"
        return run.stage(name, lambda: _measured(calibrated, replace(recipe, reduction=size), dataset, run.part(name)))

    finished = [measured(size) for size in reductions]
    _, dense_accuracy = finished[0]
    rows = [_row(0.0, dense.parameters, count_flops(dense.model), 0.0, dense_accuracy), *(row for row, _ in finished)]
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(_as_json(calibrated, recipe, dataset, rows), encoding="utf-8")
    (folder / "sweep.md").write_text(_as_markdown(rows), encoding="utf-8")
    size_chart(rows[1:], rows[0], folder / "sweep.png")
    return rows


def _measured(
    calibrated: Calibrated, recipe: CompressionRecipe, dataset: ImageStream | None, run: RunFolder
) -> tuple[dict[str, Any], dict[str, float | None]]:
    """The row of one size, and the dense model's accuracies."""
    result = build(calibrated, recipe, run=run)
    accuracy, dense_accuracy = _accuracies(calibrated, result.model, dataset)
    parameters, flops, predicted = (result.report[name] for name in ("parameters", "flops", "predicted_loss"))
    return _row(recipe.reduction or 0.0, parameters, flops, predicted, accuracy), dense_accuracy


def _row(
    reduction: float,
    parameters: int,
    flops: int,
    predicted_loss: float,
    accuracy: dict[str, float | None],
) -> dict[str, Any]:
    return {
        "reduction": reduction,
        "parameters": parameters,
        "bytes": 4 * parameters,
        "flops": flops,
        **accuracy,
        "predicted_loss": predicted_loss,
    }


def _accuracies(
    calibrated: Calibrated, model: LowRankViTForImageClassification, dataset: ImageStream | None
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Agreement, top-1 and top-5 in percent, of a compressed model and of the dense one."""
    if dataset is None:
        unknown = {"top1": None, "top5": None}
        return {"agreement": 100 * held_back_agreement(calibrated, model), **unknown}, {"agreement": 100.0, **unknown}
    dense = calibrated.dense
    measured = evaluate_classifier(
        model, dense.image_processor, dataset, device=str(dense.model.device), against=dense.model
    ).to_dict()
    small, whole = (
        {"agreement": agreement, "top1": figures["top1"], "top5": figures["top5"]}
        for agreement, figures in ((measured["agreement"], measured), (100.0, measured["against"]))
    )
    return small, whole


def _as_json(
    calibrated: Calibrated, recipe: CompressionRecipe, dataset: ImageStream | None, rows: list[dict[str, Any]]
) -> str:
    about = {
        "source": calibrated.dense.location,
        "weights_sha256": calibrated.dense.weights_sha256,
        "recipe": {**recipe.to_dict(), "reduction": None},
        "calibration": calibrated.calibration,
        "dataset": dataset.description if dataset else None,
    }
    return json.dumps({**about, "rows": rows}, indent=2, ensure_ascii=False) + "\n"


def _as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(_COLUMNS.values()) + " |", "|" + "---:|" * len(_COLUMNS)]
    removed = ["dense", *(f"{100 * row['reduction']:g} %" for row in rows[1:])]
    lines += [
        "| " + " | ".join([size, *(_cell(row[name]) for name in list(_COLUMNS)[1:])]) + " |"
        for size, row in zip(removed, rows, strict=True)
    ]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"
