"""Random views of the calibration images: crops and flips, prepared as the checkpoint's image processor does."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .images import LabelledImage

CROP_AREA = (0.35, 1.0)  # share of the image's area
CROP_RATIO = (3 / 4, 4 / 3)  # width to height
# Images are kept at no more than this many times the model's input size, which bounds memory.
KEPT_SIZE = 1.25


class RandomViews:
    """The images of a stream, decoded once and kept small, and random views of them.

    image_processor: scales and normalises the views. size: (height, width) of the model's input, in pixels.
    """

    def __init__(self, images: Iterable[LabelledImage], image_processor: Any, size: tuple[int, int]):
        self.image_processor, self.size = image_processor, size
        self.images: list[Image.Image] = []
        self.labels: list[int | None] = []
        for image, label, _ in images:
            self.images.append(_limited(image, size))
            self.labels.append(label)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> Tensor:
        """One random view of each image named: float32 (images, channels, height, width)."""
        views = [self._view(self.images[index], generator) for index in indices]
        options = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
        return self.image_processor(images=views, **options)["pixel_values"]

    def plain(self, indices: Sequence[int]) -> Tensor:
        """The images named as the processor prepares them: float32 (images, channels, height, width)."""
        images = [self.images[index] for index in indices]
        return self.image_processor(images=images, return_tensors="pt")["pixel_values"]

    def _view(self, image: Image.Image, generator: torch.Generator) -> Image.Image:
        area, shape, left, top, flip = torch.rand(5, generator=generator).tolist()
        width, height = image.size
        ratio = math.exp(math.log(CROP_RATIO[0]) + shape * (math.log(CROP_RATIO[1]) - math.log(CROP_RATIO[0])))
        pixels = width * height * (CROP_AREA[0] + area * (CROP_AREA[1] - CROP_AREA[0]))
        crop_width, crop_height = min(math.sqrt(pixels * ratio), width), min(math.sqrt(pixels / ratio), height)
        x, y = left * (width - crop_width), top * (height - crop_height)
        box = (x, y, x + crop_width, y + crop_height)
        view = image.resize(self.size[::-1], Image.Resampling.BICUBIC, box=box)
        return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip < 0.5 else view


def _limited(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    scale = KEPT_SIZE * max(size) / min(image.size)
    if scale >= 1:
        return image.copy()
    return image.resize((round(scale * image.width), round(scale * image.height)), Image.Resampling.BICUBIC)
