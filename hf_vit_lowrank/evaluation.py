"""What a classifier is worth: accuracy, agreement with the dense model, size, work and speed."""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Features, Sequence, Value
from huggingface_hub import try_to_load_from_cache
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel

from .checkpoint import CHECKPOINT_FILES, find_record, intact_record
from .dense import SUPPORTED, check_weights, checked_architecture, local_folder
from .errors import RunError, UserError, as_user_error
from .images import ImageStream
from .labels import match_labels
from .pixels import PixelBatch, load_image_processor, pixel_batches
from .progress import track
from .remote.modeling_lowrank_vit import LowRankViTForImageClassification, pair

logger = logging.getLogger(__name__)

TOP = 5
# Images on which two models disagree are recorded up to this number.
DISAGREEMENTS = 24
TIMING_SECONDS = 2.0
TIMING_RUNS = (3, 20)  # at least, at most


class TopKAccuracy(evaluate.Metric):
    """Top-1 and top-5 accuracy in percent. Predictions are the labels ranked best first, references the true labels.

    Predictions may also be the first choices alone, as `evaluate.evaluator` gives them: then there is no top-5.
    A metric of this package, since `evaluate.load` fetches its metrics from the hub.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Top-1 and top-5 accuracy in percent.",
            citation="",
            inputs_description="predictions: label indices, best first, one list each; references: label indices.",
            features=[
                Features({"predictions": Sequence(Value("int64")), "references": Value("int64")}),
                Features({"predictions": Value("int64"), "references": Value("int64")}),
            ],
        )

    def _compute(self, predictions: list[list[int]] | list[int], references: list[int]) -> dict[str, float]:
        ranked = np.asarray(predictions)
        if ranked.ndim == 1:
            return {"top1": 100 * float((ranked == np.asarray(references)).mean())}
        hits = ranked == np.asarray(references)[:, None]
        return {"top1": 100 * float(hits[:, 0].mean()), "top5": 100 * float(hits[:, :TOP].any(1).mean())}


@dataclass(frozen=True)
class EvaluationReport:
    """Accuracies and agreement in percent (None where not known), bytes of the safetensors files, FLOPs of one image.

    `top5` is among all labels where there are fewer than five. `images_per_second` is the median of forward passes over
    one batch, images ready in memory. `against`: the measurements of the dense model, `agreement`: how often both
    models' first choice is the same. `disagreements`: the first images where it is not: position in the stream, the
    class by the labels (None without), and each model's class with its probability; class names are this model's.
    """

    model: str
    images: int
    top1: float | None
    top5: float | None
    agreement: float | None
    parameters: int
    bytes_on_disk: int | None
    flops: int
    images_per_second: float
    against: dict[str, Any] | None
    data: dict[str, Any]
    disagreements: list[dict[str, Any]]
    skipped: list[str]
    batch_size: int
    device: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"


# --------------------------------------------------------------------------------------------------- loading and sizes


def load_classifier(source: str, *, revision: str | None = None) -> tuple[PreTrainedModel, Any]:
    """A compressed or dense ViT/DeiT classifier (folder or hub id) in float32, and its image processor.

    Reads safetensors only and never runs remote code. Raises UserError for whatever else it meets, RunError where
    the hub cannot be reached.
    """
    folder, commit = local_folder(source, revision, CHECKPOINT_FILES)
    options: dict[str, Any] = {"revision": commit, "trust_remote_code": False}
    with as_user_error(f"'{source}' has no config.json that can be used"):
        values, _ = PretrainedConfig.get_config_dict(source, revision=commit)
    known = (LowRankViTForImageClassification.__name__, *SUPPORTED)
    checked_architecture(values, source, known)
    with as_user_error(f"config.json of '{source}' cannot be used"):
        config = AutoConfig.from_pretrained(source, **options)
    if find_record(folder) is not None:
        intact_record(folder)
    check_weights(folder, source, AutoModelForImageClassification.from_config, config)
    with as_user_error(f"The weights of '{source}' could not be read; they must be whole, and safetensors"):
        model, info = AutoModelForImageClassification.from_pretrained(
            source, config=config, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
        )
    if info["missing_keys"]:
        raise UserError(f"'{source}' lacks weights, the first is {min(info['missing_keys'])}: get a whole copy.")
    return model.eval(), load_image_processor(source, revision=commit)


def pick_device(device: str | None = None) -> torch.device:
    """The device named, or else the best one there is: cuda, mps, cpu. Raises UserError for one that is not there."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    with as_user_error(f"The device '{device}' cannot be used here"):
        torch.zeros(1, device=device)
        return torch.device(device)


def count_parameters(model: torch.nn.Module) -> int:
    """Number of stored parameters; those shared by several modules count once."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def count_flops(model: PreTrainedModel) -> int:
    """Floating-point operations of all matrix products for one image, a multiply-add counted as two."""
    image = torch.zeros(1, model.config.num_channels, *pair(model.config.image_size), device=model.device)
    attention = model.config._attn_implementation
    # Fused kernels have no FLOP formula on every device, and on some want heads filled up; plain products do not.
    model.config._attn_implementation = "eager"
    try:
        with _evaluating(model), FlopCounterMode(display=False) as counter:
            model(pixel_values=image)
    finally:
        model.config._attn_implementation = attention
    return counter.get_total_flops()


def bytes_on_disk(model: PreTrainedModel) -> int | None:
    """Size of the safetensors files that a model was loaded from (folder or hub cache); None for one made in memory."""
    source = model.name_or_path
    if not source:
        return None
    folder = Path(source)
    if not folder.is_dir():
        commit = getattr(model.config, "_commit_hash", None)
        cached = try_to_load_from_cache(source, "config.json", revision=commit) if commit else None
        if not isinstance(cached, str):
            return None
        folder = Path(cached).parent
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) or None


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode for a while (no dropout)."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


# ---------------------------------------------------------------------------------------------------------- evaluating


def evaluate_classifier(
    model: PreTrainedModel,
    image_processor: Any,
    stream: ImageStream,
    *,
    batch_size: int = 32,
    device: str | None = None,
    against: PreTrainedModel | tuple[PreTrainedModel, Any] | None = None,
    batches: Iterable[PixelBatch] | None = None,
) -> EvaluationReport:
    """Measure a classifier on the images of a stream.

    `batches`: the images of the stream as `image_processor` prepares them, from a caller who measures several models.
    `against`: the dense model, by itself or with an image processor of its own. Classes of the data set, of the model
    and of the dense model are matched by name. Without labels only the agreement is measured, so `against` is needed.
    The models are moved to `device` (None: the best there is) and left there.
    Raises UserError for class names that cannot be matched, and for labels and `against` both missing.
    """
    if against is None and stream.description["label_column"] is None:
        raise UserError(
            f"'{stream.description['location']}' has no label column: name it, sort the images into a folder for each "
            "class, or give a dense model to compare with."
        )
    target = pick_device(device)
    batches = pixel_batches(stream, image_processor, batch_size) if batches is None else batches
    run = _Run(model, image_processor, stream, target)
    if against is None:
        _pass([run], stream, batches)
        return _report(run, None, stream, batch_size)
    dense = _Run(*(against if isinstance(against, tuple) else (against, image_processor)), stream, target)
    _dense_to_ours(dense.model, model)  # refuses before the work
    if dense.image_processor.to_dict() == image_processor.to_dict():
        _pass([run, dense], stream, batches)
    else:
        _pass([run], stream, batches)
        _pass([dense], stream, pixel_batches(stream, dense.image_processor, batch_size))
    return _report(run, dense, stream, batch_size)


class _Run:
    """One model, and what it has said about the images so far."""

    def __init__(self, model: PreTrainedModel, image_processor: Any, stream: ImageStream, device: torch.device) -> None:
        torch.nn.Module.to(model, device)
        self.model = model
        self.image_processor = image_processor
        self.device = device
        self.class_of = class_of_label(stream, model)
        self.metric = TopKAccuracy(keep_in_memory=True)
        self.labelled = 0
        self.top: list[int] = []  # first choice for each image
        self.probability: list[float] = []  # of that choice
        self.labels: list[int | None] = []  # class by the labels of the data set
        self.positions: list[int] = []
        self.first_pixels = torch.empty(0)

    def add(self, batch: PixelBatch) -> None:
        pixels = batch.pixel_values.to(self.device)
        if not len(self.first_pixels):
            self.first_pixels = pixels
        logits = _logits(self.model, pixels)
        if not logits.isfinite().all():
            name, first, last = _name(self.model), batch.positions[0], batch.positions[-1]
            raise RunError(f"'{name}' gives logits that are NaN or infinite, somewhere in images {first} to {last}.")
        ranked = logits.topk(min(TOP, logits.shape[-1])).indices.tolist()
        self.top += [ranks[0] for ranks in ranked]
        self.probability += logits.softmax(-1).amax(-1).tolist()
        self.labels += [None if label is None else self.class_of(label) for label in batch.labels]
        self.positions += batch.positions
        labelled = [index for index, label in enumerate(batch.labels) if label is not None]
        if labelled:
            references = [self.class_of(label) for label in batch.labels if label is not None]
            self.metric.add_batch(predictions=[ranked[index] for index in labelled], references=references)
            self.labelled += len(labelled)

    def measurements(self) -> dict[str, Any]:
        accuracy = self.metric.compute() if self.labelled else {"top1": None, "top5": None}
        return {
            "model": _name(self.model),
            **accuracy,
            "parameters": count_parameters(self.model),
            "bytes_on_disk": bytes_on_disk(self.model),
            "flops": count_flops(self.model),
        }


def _classes(model: PreTrainedModel) -> dict[int, str]:
    return {int(label): str(name) for label, name in (model.config.id2label or {}).items()}


def class_of_label(stream: ImageStream, model: PreTrainedModel) -> Callable[[int], int]:
    """The model's class for a label of the data set: by name, or by number where the data set has no names at all."""
    if stream.label_names is not None:
        return match_labels(stream.label_names, _classes(model)).__getitem__
    if stream.description["label_column"] is not None:
        logger.warning("the data set names no classes: its label numbers are taken as those of %s", _name(model))
    return lambda label: _checked_label(label, model)


def _checked_label(label: int, model: PreTrainedModel) -> int:
    if label not in _classes(model):
        raise UserError(f"The data set has the label {label}, and '{_name(model)}' knows only {len(_classes(model))}.")
    return label


def _dense_to_ours(dense: PreTrainedModel, model: PreTrainedModel) -> list[int]:
    theirs, ours = _classes(dense), _classes(model)
    if theirs == ours:
        return list(range(len(theirs)))
    return match_labels([theirs[label] for label in range(len(theirs))], ours)


def _pass(runs: list[_Run], stream: ImageStream, batches: Iterable[PixelBatch]) -> None:
    for batch in track(batches, "Evaluation", stream.length, size=lambda batch: len(batch.positions)):
        for run in runs:
            run.add(batch)


@torch.inference_mode()
def _logits(model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    """Logits (B, labels) in float32 on the CPU; the copy waits for the device, so this can be timed."""
    with _evaluating(model):
        return model(pixel_values=pixels).logits.float().cpu()


def _images_per_second(runs: list[_Run]) -> list[float]:
    """The median for each model; the models take turns, so that a busy machine does not slow one of them only."""
    for run in runs:
        _logits(run.model, run.first_pixels)  # warm-up
    least, most = TIMING_RUNS
    rounds: list[list[float]] = []
    start = time.perf_counter()
    while len(rounds) < least or (len(rounds) < most and time.perf_counter() - start < TIMING_SECONDS * len(runs)):
        rounds.append([_seconds(run) for run in runs])
    medians = [statistics.median(times) for times in zip(*rounds, strict=True)]
    return [len(run.first_pixels) / median for run, median in zip(runs, medians, strict=True)]


def _seconds(run: _Run) -> float:
    start = time.perf_counter()
    _logits(run.model, run.first_pixels)
    return time.perf_counter() - start


def _report(run: _Run, dense: _Run | None, stream: ImageStream, batch_size: int) -> EvaluationReport:
    runs = [run, dense] if dense else [run]
    measured = [each.measurements() for each in runs]
    for each, rate in zip(measured, _images_per_second(runs), strict=True):
        each["images_per_second"] = rate
    if dense and measured[1]["top1"] is not None:
        _warn_if_near_chance(measured[1]["model"], measured[1]["top1"], len(_classes(dense.model)))
    return EvaluationReport(
        **measured[0],
        images=len(run.top),
        agreement=_agreement(run, dense) if dense else None,
        against=measured[1] if dense else None,
        data=stream.description,
        disagreements=_disagreements(run, dense) if dense else [],
        skipped=list(stream.skipped),
        batch_size=batch_size,
        device=str(run.device),
    )


def _agreement(run: _Run, dense: _Run) -> float:
    """Percentage of images for which both models' first choice is the same class."""
    ours = _dense_to_ours(dense.model, run.model)
    return 100 * statistics.fmean(top == ours[theirs] for top, theirs in zip(run.top, dense.top, strict=True))


def _disagreements(run: _Run, dense: _Run) -> list[dict[str, Any]]:
    ours, names = _dense_to_ours(dense.model, run.model), _classes(run.model)
    different = [index for index, theirs in enumerate(dense.top) if run.top[index] != ours[theirs]]
    return [
        {
            "image": run.positions[index],
            "label": None if (label := run.labels[index]) is None else names[label],
            "dense": names[ours[dense.top[index]]],
            "dense_probability": round(dense.probability[index], 4),
            "compressed": names[run.top[index]],
            "compressed_probability": round(run.probability[index], 4),
        }
        for index in different[:DISAGREEMENTS]
    ]


def _warn_if_near_chance(name: str, top1: float, labels: int) -> None:
    chance = 100 / labels
    if top1 < chance + 0.1 * (100 - chance):
        logger.warning("the dense model %s reaches only %.1f %% top-1: do labels and image processor fit?", name, top1)


def _name(model: PreTrainedModel) -> str:
    return model.name_or_path or type(model).__name__
