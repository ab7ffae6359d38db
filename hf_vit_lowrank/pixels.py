"""From decoded images to pixel batches, prepared by the checkpoint's own processor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import transformers
from PIL import Image

from .errors import UserError, reason
from .images import LabelledImage


@dataclass(frozen=True)
class PixelBatch:
    """`pixel_values`: float32 (B, C, H, W). `labels`, `positions`: B entries each, as in LabelledImage."""

    pixel_values: torch.Tensor
    labels: list[int | None]
    positions: list[int]


def load_image_processor(source: str, *, revision: str | None = None) -> Any:
    """The image processor of a checkpoint (folder or hub id), always with the Pillow backend; runs no remote code.

    Raises UserError where the checkpoint has none that can be used.
    """
    # The two backends give slightly different pixels and the default depends on what is installed.
    backend = {"backend": "pil"} if int(transformers.__version__.split(".")[0]) >= 5 else {"use_fast": False}
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(
            source, revision=revision, trust_remote_code=False, **backend
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UserError(
            f"'{source}': no usable image processor; the checkpoint needs a preprocessor_config.json of a class that "
            f"transformers knows ({reason(error)})."
        ) from error
    if getattr(processor, "backend", "pil") != "pil":
        raise UserError(f"'{source}': {type(processor).__name__} has no Pillow backend, which is the one supported.")
    return processor


def pixel_batches(stream: Iterable[LabelledImage], image_processor: Any, batch_size: int) -> Iterator[PixelBatch]:
    """Prepare the images of a stream in batches, in order; the last one may be smaller.

    Raises UserError for a pixel that is not finite or images that the processor leaves at different sizes.
    """
    return _one_ahead(_pixel_batches(iter(stream), image_processor, batch_size))


def _pixel_batches(images: Iterator[LabelledImage], image_processor: Any, batch_size: int) -> Iterator[PixelBatch]:
    while batch := list(islice(images, batch_size)):
        positions = [item.position for item in batch]
        pixels = prepare([item.image for item in batch], image_processor, positions).float()
        for finite, position in zip(pixels.isfinite().flatten(1).all(1).tolist(), positions, strict=True):
            if not finite:
                raise UserError(f"image {position}: the image processor gives pixels that are NaN or infinite.")
        yield PixelBatch(pixels, [item.label for item in batch], positions)


def prepare(images: list[Image.Image], image_processor: Any, positions: list[int], **options: Any) -> torch.Tensor:
    """What the processor makes of images, (images, channels, height, width); options: of its call.

    Raises UserError, which names the positions, where it fails.
    """
    mean = getattr(image_processor, "image_mean", None)
    if isinstance(mean, (list, tuple)) and len(mean) == 1:  # a model of grayscale images
        images = [image.convert("L") for image in images]
    try:
        return image_processor(images=images, return_tensors="pt", **options)["pixel_values"]
    except ValueError as error:
        raise UserError(
            f"images {positions[0]} to {positions[-1]}: the image processor fails, most often because it does not "
            f"bring images to one size ({reason(error)})."
        ) from error


def _one_ahead(batches: Iterator[PixelBatch]) -> Iterator[PixelBatch]:
    """Prepare the next batch in one thread while the caller computes with this one."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, batches, None)
        while (batch := future.result()) is not None:
            future = pool.submit(next, batches, None)
            yield batch
