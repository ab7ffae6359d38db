"""Methods × sizes on the same images and budget: each cell is measured once and kept on disk; tables and charts."""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch

from .bench_cells import Cell, Method, Store, common_ground
from .calibration import Calibrated, calibrate, training_share
from .charts import bytes_chart, methods_chart, plan_chart
from .compress import CompressionResult, build
from .dense import DenseSource, load_dense
from .errors import UserError, reason
from .evaluation import count_flops, evaluate_classifier, pick_device
from .images import ImageStream
from .model_card import evaluation_record, model_card
from .pivoting import unpivoted
from .pixels import PixelBatch, pixel_batches
from .quantised import LIBRARIES, QUANTISERS, check_quantisers, quantise, serialised_bytes
from .recipe import OURS, PRESETS, CompressionRecipe
from .record import versions
from .remote.modeling_lowrank_vit import LowRankViTForImageClassification
from .run_folder import RunFolder

DENSE = "dense"


# Distillation of our own is left out: it takes hours, so it is done where it is asked for.
DEFAULT_METHODS = (
    *(Method(preset, "none") for preset in PRESETS),
    *(Method(OURS, compensation) for compensation in ("closed-form", "gradient")),
)


def bench(
    source: str,
    calibration: ImageStream,
    dataset: ImageStream,
    base: CompressionRecipe,
    *,
    methods: Sequence[Method],
    sizes: Sequence[float],
    output: str | Path,
    quantised: bool = False,
    device: str | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Compress by every method to every size, measure top-1 and top-5, and write what came out.

    base: what all recipes share (samples, batch size, seed, distillation); its target, preset and compensation do not
        count.
    quantised: also measure the dense model and ours in 8 and 4 bits (see `quantised.quantise`).
    output: a folder. cells/ gets a file for each cell as soon as it is measured; a later call with the same weights,
        images and recipe takes it from there, so a call that was killed goes on. A method that cannot reach a size is
        recorded with the reason; one that failed otherwise too, but is tried again by the next call. accuracy.json,
        accuracy.md, accuracy.png (top-1 against parameters) and bytes.png (against bytes) are made of all cells; cards/
        has the model card of each.

    Returns the cells' records, the dense model's first.

    Raises:
        UserError: a source or data set that cannot be used, no method or size, images without labels, or finished
            cells in `output` that were calibrated on other images of the same data set.
        RunError: the calibration data were empty or the model overflows on them.
    """
    if not methods or not sizes:
        raise UserError("A comparison needs at least one method and one size.")
    if dataset.description["label_column"] is None:
        raise UserError(f"'{dataset.description['location']}' has no label column, so accuracy cannot be measured.")
    if quantised:
        check_quantisers()
    dense = load_dense(source)
    about = common_ground(dense, calibration, dataset)
    store = Store(Path(output) / "cells", about)
    cells = _cells(methods, sizes, base, quantised)
    missing = [cell for cell in cells if not store.finished(cell)]
    say(f"{len(cells) - len(missing)} of {len(cells)} cells are finished")
    if missing:
        torch.nn.Module.to(dense.model, pick_device(device))
        known = {store.read(cell)["calibration_sha256"] for cell in cells if store.finished(cell) and cell.recipe}
        workshop = _Workshop(source, dense, calibration, known, Path(output))
        batches = PreparedImages(dataset, dense.image_processor, base.batch_size)
        _measure_all(workshop, batches, missing, store, say)
    records = [store.read(cell) for cell in cells]
    _write(Path(output), about, records)
    return records


def _cells(methods: Sequence[Method], sizes: Sequence[float], base: CompressionRecipe, quantised: bool) -> list[Cell]:
    """In the order of the table, a model's quantised versions right after it; each once."""
    kinds = (None, *QUANTISERS) if quantised else (None,)
    cells = [Cell(DENSE, 0.0, None, kind) for kind in kinds]
    for method in methods:
        own = kinds if method.ours else (None,)
        cells += [Cell(method.name, size, method.recipe(base, size), kind) for size in sizes for kind in own]
    return list(dict.fromkeys(cells))


# ----------------------------------------------------------------------------------------------------------- measuring


class _Workshop:
    """Makes the models of all cells. What the images tell is collected when it is first needed.

    known: hashes of the calibration images that finished cells were made with.
    output: where a build keeps its finished stages until its model has been measured, and where cards go.
    """

    def __init__(
        self, source: str, dense: DenseSource, calibration: ImageStream, known: set[str], output: Path
    ) -> None:
        self.dense, self.runs, self.cards = dense, output / "runs", output / "cards"
        self._source, self._calibration, self._known = source, calibration, known
        self._calibrated: tuple[float, Calibrated] | None = None
        self._built: tuple[CompressionRecipe, CompressionResult] | None = None

    def calibrated(self, recipe: CompressionRecipe) -> Calibrated:
        """As `compress` would for this recipe: whoever trains holds some of the images back, nobody else loses them."""
        share = training_share(recipe)
        if self._calibrated is None or self._calibrated[0] != share:
            self._calibrated = None  # gives its memory back before the next is made
            device = str(self.dense.model.device)
            every_size = replace(recipe, reduction=0.0)  # one that cannot be reached is its own cell's failure
            made = calibrate(self._source, self._calibration, every_size, hold_back=share, device=device)
            # A data set on the hub may have changed under its name.
            if self._known - {made.calibration["sha256"]}:
                raise UserError(
                    f"'{made.calibration['location']}' holds other images than when finished cells were calibrated: "
                    "choose another output folder."
                )
            self._calibrated = share, made
        return self._calibrated[1]

    def build(self, recipe: CompressionRecipe) -> CompressionResult:
        """A float32 model on the dense model's device, and its record; the last one is kept for another call.

        Raises UserError where the method cannot reach the size.
        """
        if self._built is None or self._built[0] != recipe:
            self._built = None
            calibrated = self.calibrated(recipe)
            start = time.perf_counter()
            run = RunFolder(self.runs / recipe.fingerprint())
            run.require(weights_sha256=self.dense.weights_sha256, image_sha256=calibrated.calibration["sha256"])
            result = build(calibrated, recipe, run=run)
            result.report["seconds"] = {"build": time.perf_counter() - start}
            torch.nn.Module.to(result.model, self.dense.model.device)
            self._built = recipe, result
        return self._built[1]

    def write_card(self, cell: Cell, record: dict[str, Any], evaluation: dict[str, Any]) -> None:
        """The model card of a cell, named by method and size."""
        self.cards.mkdir(exist_ok=True)
        name = f"{cell.method.replace('/', '+')}_{cell.size:g}.md"
        picture = f"{name.removesuffix('.md')}.png"
        (self.cards / picture).write_bytes(plan_chart(record["plan"]))
        card = model_card({**record, "evaluation": evaluation_record(evaluation)}, picture=picture)
        (self.cards / name).write_text(card, encoding="utf-8")


def _measure_all(
    workshop: _Workshop, batches: PreparedImages, cells: Sequence[Cell], store: Store, say: Callable[[str], None]
) -> None:
    # Those that need the same calibration one after the other, the dense model first.
    ordered = sorted(cells, key=lambda cell: training_share(cell.recipe) if cell.recipe else -1.0)
    for number, cell in enumerate(ordered, 1):
        calibrated = workshop.calibrated(cell.recipe) if cell.recipe else None
        try:
            record = _measure(cell, workshop, batches, store)
        except UserError:  # about the images or their classes, so the same for all cells
            raise
        except Exception as error:  # one method's fault must not cost the whole night
            record = {"failed": f"{type(error).__name__}: {reason(error)}.", "final": False}
        record |= {
            "calibration_sha256": calibrated.calibration["sha256"] if calibrated else None,
            "machine": _machine(workshop.dense.model.device),
            "versions": versions() | {name: version(name) for name in (LIBRARIES if cell.quantised else ())},
        }
        store.write(cell, record)
        if cell.recipe and record["final"]:  # else the next call goes on from there
            shutil.rmtree(workshop.runs / cell.recipe.fingerprint(), ignore_errors=True)
        outcome = record["failed"] or f"top-1 {record['top1']:.2f} %"
        say(f"{number}/{len(cells)} {_title(cell.method, cell.quantised)} at {_removed(cell.size)}: {outcome}")
    with suppress(OSError):  # not there, or not empty
        workshop.runs.rmdir()


def _measure(cell: Cell, workshop: _Workshop, batches: PreparedImages, store: Store) -> dict[str, Any]:
    try:
        result = workshop.build(cell.recipe) if cell.recipe else None
    except UserError as error:  # this method does not get to this size
        return {"failed": str(error), "final": True}
    plain = result.model if result else workshop.dense.model
    model = _quantised(plain, cell.quantised) if cell.quantised else plain
    start = time.perf_counter()
    report = evaluate_classifier(
        model,
        batches.image_processor,
        batches.stream,
        batch_size=batches.batch_size,
        device=str(plain.device),
        batches=batches,
    )
    if result and not cell.quantised:
        dense = store.read(Cell(DENSE, 0.0, None))
        against = None if dense["failed"] else {name: dense[name] for name in ("top1", "top5")}
        workshop.write_card(cell, result.report, {**report.to_dict(), "against": against})
    return {
        "parameters": result.report["parameters"] if result else workshop.dense.parameters,
        "bytes": serialised_bytes(model),
        "flops": result.report["flops"] if result else count_flops(plain),
        "top1": report.top1,
        "top5": report.top5,
        "images": report.images,
        "skipped": report.skipped,
        "held_back_divergence": _held_back_divergence(result.report) if result else None,
        "seconds": {
            "build": result.report["seconds"]["build"] if result else 0.0,
            "evaluation": time.perf_counter() - start,
        },
        "failed": None,
        "final": True,
    }


def _quantised(model: LowRankViTForImageClassification, kind: str) -> LowRankViTForImageClassification:
    if kind == "hqq4":  # 4 bits of pivoted weights would take DeiT-tiny at −40 % from 77 to 65 % top-1
        model = torch.nn.Module.to(unpivoted(model), model.device)
    return quantise(model, kind)


def _held_back_divergence(report: dict[str, Any]) -> float | None:
    """From the dense model's probabilities on calibration images that training held back, in nats; None without."""
    trained = report.get("distillation") or report.get("gradient")
    return trained["after" if trained["kept"] else "before"] if trained else None


class PreparedImages:
    """The pixel batches of a stream, again and again; kept in memory where they take at most half of what is free."""

    def __init__(self, stream: ImageStream, image_processor: Any, batch_size: int) -> None:
        self.stream, self.image_processor, self.batch_size = stream, image_processor, batch_size
        self._kept: list[PixelBatch] = []

    def __iter__(self) -> Iterator[PixelBatch]:
        if self._kept:
            yield from self._kept
            return
        kept: list[PixelBatch] = []
        keep: bool | None = None
        for batch in pixel_batches(self.stream, self.image_processor, self.batch_size):
            keep = self._fits(batch) if keep is None else keep
            if keep:
                kept.append(batch)
            yield batch
        self._kept = kept

    def _fits(self, batch: PixelBatch) -> bool:
        if self.stream.length is None:
            return False
        return self.stream.length * batch.pixel_values[0].nbytes <= psutil.virtual_memory().available / 2


def _machine(device: torch.device) -> dict[str, Any]:
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"device": device.type, "card": card, "cpu": _cpu_name(), "threads": torch.get_num_threads()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


# --------------------------------------------------------------------------------------------------- tables and charts


def _write(folder: Path, about: dict[str, Any], records: Sequence[dict[str, Any]]) -> None:
    text = json.dumps({**about, "cells": list(records)}, indent=2, ensure_ascii=False)
    (folder / "accuracy.json").write_text(text + "\n", encoding="utf-8")
    (folder / "accuracy.md").write_text(accuracy_tables(records), encoding="utf-8")
    if records[0]["failed"] is None:
        drawn = [record for record in records if record["failed"] is None]
        methods_chart(drawn, folder / "accuracy.png")
        bytes_chart(drawn, folder / "bytes.png")


def accuracy_tables(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: top-1 of methods × sizes, then the models whose bytes were measured beside others', then what failed.

    records: as `bench` returns them, the dense model's first.
    """
    sizes = sorted({record["size"] for record in records if record["method"] != DENSE})
    plain = {(record["method"], record["size"]): record for record in records if not record["quantised"]}
    rows = [["top-1 %", *(_removed(size) for size in sizes)]]
    for method in dict.fromkeys(record["method"] for record in records):
        places = [0.0] * len(sizes) if method == DENSE else sizes
        rows.append([method, *(_percent(plain.get((method, size))) for size in places)])
    parts = [_markdown(rows), _markdown(_byte_rows(records))]
    failed = [record for record in records if record["failed"] is not None]
    if failed:
        parts.append(
            "".join(f"- {_title_of(record)} at {_removed(record['size'])}: {record['failed']}\n" for record in failed)
        )
    return "\n".join(parts)


def _byte_rows(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = [["", "removed", "parameters", "bytes", "FLOPs", "top-1 %", "top-5 %"]]
    for record in records:
        numbers = ["–"] * 5
        if record["failed"] is None:
            numbers = [f"{record[name]:,}" for name in ("parameters", "bytes", "flops")]
            numbers += [f"{record[name]:.2f}" for name in ("top1", "top5")]
        rows.append([_title_of(record), _removed(record["size"]), *numbers])
    return rows


def _markdown(rows: Sequence[Iterable[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" + "|---:" * (len(list(rows[0])) - 1) + "|")
    return "\n".join(lines) + "\n"


def _percent(record: dict[str, Any] | None) -> str:
    return "–" if record is None or record["failed"] is not None else f"{record['top1']:.2f}"


def _removed(size: float) -> str:
    return f"−{100 * size:g} %" if size else "full size"


def _title(method: str, quantised: str | None) -> str:
    return f"{method}, {quantised}" if quantised else method


def _title_of(record: dict[str, Any]) -> str:
    return _title(record["method"], record["quantised"])
