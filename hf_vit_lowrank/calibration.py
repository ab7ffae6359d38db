"""What is the same for all sizes: the dense model, what the images told about it, and the error curves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from . import processes
from .augmentation import RandomViews
from .budget import check_reachable, recipe_stream
from .candidates.block import BlockCandidates, block_candidates
from .candidates.embedding import EmbeddingCandidates, embedding_candidates
from .dense import DenseSource, load_dense
from .dense_layout import require_free_head_sizes
from .divergence import stream_logits
from .embeddings import whole_positions
from .errors import UserError
from .evaluation import class_of_label, pick_device
from .images import ImageStream, Share, open_images
from .memory import MemoryPlan, memory_plan
from .narrowing import MOST_IMAGES, entries, narrowed, stream_basis
from .out_of_memory import with_smaller_batches
from .pixels import pixel_batches
from .precision import half_precision
from .presets.inputs import PresetInputs
from .progress import say, track
from .recipe import TRAINED, CompressionRecipe
from .record import source_record, versions
from .remote.modeling_lowrank_vit import LowRankViTForImageClassification, pair
from .run_folder import RunFolder
from .statistics import BlockStatistics, Moments, collect_statistics
from .timing import timed

# Share of the calibration images held back: to measure agreement on, and to decide what training may keep.
AGREEMENT_SHARE = 0.2
TRAINING_SHARE = 0.1
NOWHERE = RunFolder()
# A CPU takes a fifth less time over so many images at once than over 32, whose activations leave its caches.
CPU_IMAGES_AT_ONCE = 8


@dataclass(frozen=True)
class Calibrated:
    """What any size is made from: the dense model, what the images told about it, and the images' embeddings.

    images_at_once: how many of a batch the statistics and the refits work on.
    distilled_at_once: how many of a batch go through the smaller model where the whole of it is trained, if not all.
    native: whether the candidates are for a plan that transformers' own classes can hold.
    dense: the dense model or a narrower one, which embeddings, statistics and streams then are of.
    held_back, expected: embeddings of images that nothing is fitted on, the last of the stream, and the dense model's
        logits for them, if some were asked for.
    group: how many blocks' moments are collected at once and parked in `run`; None where all are kept.
    narrowed: that of the narrower stream that was last asked for, by its number of entries.
    """

    dense: DenseSource
    images: ImageStream
    fitting: list[Tensor]
    held_back: list[Tensor]
    expected: Tensor
    calibration: dict[str, Any]
    seed: int
    images_at_once: int
    distilled_at_once: int | None
    native: bool
    seconds: dict[str, float]
    run: RunFolder = NOWHERE
    group: int | None = None
    narrowed: dict[int, Calibrated] = field(default_factory=dict)

    def narrower(self, recipe: CompressionRecipe) -> Calibrated:
        """The same for the stream of a recipe's size, which is learned when first asked for."""
        size = recipe_stream(self.dense, recipe)
        if size == self.dense.model.config.hidden_size:
            return self
        if size not in self.narrowed:
            self.narrowed.clear()  # each has a model, images and moments of its own
            self.narrowed[size] = self._with_stream(size, self.run.part(f"stream-{size}"))
        return self.narrowed[size]

    def _with_stream(self, size: int, run: RunFolder) -> Calibrated:
        def learn() -> Tensor:
            # Every process learns the same, from the images of all.
            a_round = processes.count() * max(processes.gather(len(self.fitting[0])))
            images = torch.cat(self._fitting_of_all(-(-MOST_IMAGES // a_round)))[:MOST_IMAGES]
            return with_smaller_batches(
                "Stream",
                lambda at_once: stream_basis(self.dense.model, images, size, self.seed, at_once),
                self.images_at_once,
            )

        with timed(self.seconds, "stream"), torch.enable_grad():
            basis = processes.from_main(run.stage("stream", learn))
            model, change = narrowed(self.dense.model, basis).requires_grad_(False), entries(basis).float()
        return replace(
            self,
            dense=replace(self.dense, model=model),
            fitting=[batch @ change for batch in self.fitting],
            held_back=[batch @ change for batch in self.held_back],
            run=run,
            narrowed={},
        )

    @cached_property
    def statistics(self) -> Sequence[BlockStatistics]:
        """Of all blocks; where memory is limited they are on disk, and read when they are asked for."""
        with timed(self.seconds, "statistics"), torch.enable_grad():
            if self.group is None:
                return self.run.stage("statistics", lambda: self._collected(None))
            layers = range(self.dense.model.config.num_hidden_layers)
            for start in layers[:: self.group]:
                self._park_group(layers[start : start + self.group])
            return self._parking.parked([f"statistics-{layer}" for layer in layers])

    @property
    def _parking(self) -> RunFolder:
        return self.run.part("blocks")

    def _park_group(self, layers: range) -> None:
        """A function of its own, so that one group's moments are gone before the next group's are collected."""
        if all(self._parking.has(f"statistics-{layer}") for layer in layers):
            return
        for layer, moments in zip(layers, self._collected(layers), strict=True):
            self._parking.save(f"statistics-{layer}", moments)

    def _collected(self, layers: range | None) -> list[BlockStatistics]:
        model, images = self.dense.model, sum(map(len, self.fitting))
        half = model.device.type == "cuda" and half_precision(model.device)
        precision = torch.bfloat16 if half else torch.float32

        def collect(size: int) -> list[BlockStatistics]:
            tracked = track(self.fitting, "Statistics", images, size=len)
            return collect_statistics(model, tracked, self.seed, precision, layers, size)

        return with_smaller_batches("Statistics", collect, self.images_at_once)

    @cached_property
    def candidates(self) -> Sequence[BlockCandidates]:
        """Error curves and what they come from, one per block; on disk where memory is limited."""
        layers = range(self.dense.model.config.num_hidden_layers)
        with timed(self.seconds, "candidates"):
            if self.group is None:
                own = processes.share(layers)
                blocks = track(own, "Error curves", len(own), "blocks")
                shares = processes.gather([self._candidates(layer) for layer in blocks])
                return [shares[layer % len(shares)][layer // len(shares)] for layer in layers]
            # Every process reads what is parked at the same time, so every process makes all of it.
            for layer in track(layers, "Error curves", len(layers), "blocks"):
                self._parking.stage(f"candidates-{layer}", partial(self._candidates, layer))
            return self._parking.parked([f"candidates-{layer}" for layer in layers])

    def _candidates(self, layer: int) -> BlockCandidates:
        block: Any = self.dense.model.vit.blocks[layer]
        weights = block.attention.output.weight, block.mlp.up.weight, block.mlp.down.weight
        return block_candidates(*weights, self.statistics[layer], self.native)

    @cached_property
    def embedding(self) -> EmbeddingCandidates:
        """Error curves of the two pieces of the embeddings, and what they come from."""
        model = self.dense.model
        gradient = self.statistics[0].attention_gradient
        with timed(self.seconds, "candidates"):
            positions = whole_positions(model.vit.embeddings)[model.config.num_prefix_tokens :]
            projections = Moments.zeros(model.config.hidden_size)
            for batch in self.fitting:
                projected = batch[:, model.config.num_prefix_tokens :] - positions.float()
                projections.add(projected.flatten(0, 1))
            projections.add_up()
            return embedding_candidates(projections, positions, gradient)

    @cached_property
    def presets(self) -> PresetInputs:
        """What the other methods are built from."""
        images = self._fitting_of_all(len(self.fitting))
        return PresetInputs(self.dense.model, images, self.statistics, self.seed, self.images_at_once)

    def _fitting_of_all(self, batches: int) -> list[Tensor]:
        """Every process gets the first batches of all, in the order of one process."""
        rounds = zip_longest(*processes.gather(self.fitting[:batches]))
        return [batch for batches in rounds for batch in batches if batch is not None]

    @cached_property
    def views(self) -> RandomViews:
        """All images, the held-back ones last; decoded when first asked for."""
        model = self.dense.model
        return RandomViews(self.images, self.dense.image_processor, pair(model.config.image_size), model.device)


def label_classes(images: ImageStream, model: LowRankViTForImageClassification) -> Callable[[int], int]:
    """The dense model's class for a label of the images. Raises UserError where they have none, or other classes."""
    if images.description["label_column"] is None:
        raise UserError(
            f"'{images.description['location']}' has no label column to learn from: name it, sort the images into a "
            "folder for each class, or leave labels out."
        )
    return class_of_label(images, model)


def training_share(recipe: CompressionRecipe) -> float:
    """Share of the calibration images that a recipe holds back to decide what training may keep; 0 without training."""
    return TRAINING_SHARE if recipe.compensation in TRAINED else 0.0


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
    with timed(seconds, "load"):
        dense = load_dense(source, revision=revision, allow_pickle=allow_pickle)
        dense.model.requires_grad_(False)
        torch.nn.Module.to(dense.model, _device(device, recipe))
        _refuse_early(dense, recipe, calibration)
    if memory_limit is not None and run.folder is None:
        raise UserError("A memory limit needs a run folder, where the moments are parked.")
    on_cpu = dense.model.device.type == "cpu"
    at_once = min(recipe.batch_size, CPU_IMAGES_AT_ONCE) if on_cpu else recipe.batch_size
    memory = memory_plan(dense.model.config, recipe, at_once, memory_limit)
    say(f"Memory: about {memory.peak / 1e9:.1f} GB, {memory.passes} passes over the images for the statistics")
    _require_same_run(run, dense, recipe, calibration, memory)
    with timed(seconds, "images"):
        own = _own_share(calibration, recipe)
        fitting, held_back = _split(_embed(dense, own, recipe.batch_size), hold_back, recipe.batch_size)
        expected = stream_logits(dense.model, held_back)
    about = {
        **calibration.description,
        "images": int(processes.total(sum(map(len, fitting + held_back)))),
        "sha256": _joint_sha256(own),
        "skipped": [image for skipped in processes.gather(list(own.skipped)) for image in skipped],
        "processes": processes.count(),
    }
    run.require(image_sha256=about["sha256"])
    return Calibrated(
        *(dense, calibration, fitting, held_back, expected, about),
        seed=recipe.seed,
        images_at_once=memory.batch_size,
        distilled_at_once=None if memory_limit is None else memory.distilled,
        native=recipe.native,
        seconds=seconds,
        run=run,
        group=None if memory_limit is None else memory.group,
    )


def _refuse_early(dense: DenseSource, recipe: CompressionRecipe, images: ImageStream) -> None:
    """What cannot be is refused before the long work."""
    if recipe.min_agreement is None:
        check_reachable(dense, recipe)
    if recipe.labels:
        label_classes(images, dense.model)
    if recipe.native:
        require_free_head_sizes("Native plans need")


def _require_same_run(
    run: RunFolder, dense: DenseSource, recipe: CompressionRecipe, images: ImageStream, memory: MemoryPlan
) -> None:
    """All that the bits of a result depend on, but for the images themselves."""
    run.require(
        recipe=recipe.to_dict(),
        source=source_record(dense),
        config=dense.model.config.to_dict(),
        image_processor=dense.image_processor.to_dict(),
        images=images.description,
        versions=versions(),
        device=dense.model.device.type,
        processes=processes.count(),
        # They change the last bits; how many blocks are a group does not.
        images_at_once=memory.batch_size,
        distilled_at_once=memory.distilled,
    )
    if not run.has("statistics"):
        run.require_room(memory.moments)


def _own_share(images: ImageStream, recipe: CompressionRecipe) -> ImageStream:
    """This process's images; training reads a whole stream in every process, and must know which of its images are held
    back."""
    if processes.count() == 1:
        return images
    in_order = recipe.compensation in TRAINED
    return images.shared(Share(processes.index(), processes.count(), recipe.batch_size, in_order))


def _device(name: str | None, recipe: CompressionRecipe) -> torch.device:
    if processes.count() > 1:
        return processes.device()
    device = pick_device(name)
    if recipe.compensation == "distill" and device.index:
        raise UserError(
            f"Distillation trains on the first GPU: make {device} the first, by CUDA_VISIBLE_DEVICES={device.index} in "
            "place of --device."
        )
    return device


@torch.no_grad()
def _embed(dense: DenseSource, images: ImageStream, batch_size: int) -> list[Tensor]:
    """Embeddings of all images, batches of (images, tokens, d), on the CPU; pixels are not needed after this."""
    batches = pixel_batches(images, dense.image_processor, batch_size)
    device, config, embeddings = dense.model.device, dense.model.config, []
    taken = config.num_channels, *pair(config.image_size)
    for batch in track(batches, "Images", images.length, size=lambda batch: len(batch.pixel_values)):
        if (made := tuple(batch.pixel_values.shape[1:])) != taken:
            raise UserError(
                f"The image processor of '{dense.location}' makes images of (channels, height, width) {made}, and its "
                f"model takes {taken}: mend its preprocessor_config.json."
            )
        embeddings.append(dense.model.vit.embeddings(batch.pixel_values.to(device)).cpu())
    return embeddings


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
