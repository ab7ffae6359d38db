"""Random views of the calibration images: crops and flips, prepared as the checkpoint's image processor does.

Where a GPU has room for the images, the views are made there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from .images import LabelledImage
from .memory import near
from .pixels import prepare

CROP_AREA = (0.35, 1.0)  # share of the image's area
CROP_RATIO = (3 / 4, 4 / 3)  # width to height
# The shorter sides of images are kept at no more than this many times the model's input size, which bounds memory.
KEPT_SIZE = 1.25


class RandomViews:
    """The images of a stream, decoded once and kept small, and random views of them.

    image_processor: says how pixels are scaled. size: (height, width) of the model's input, in pixels. device: where
    the views are wanted.
    """

    def __init__(
        self, images: Iterable[LabelledImage], image_processor: Any, size: tuple[int, int], device: torch.device
    ):
        self.size, self.device = size, device
        kept, prepared = [], []  # (channels, height, width): to crop from, and as the processor resizes them
        self.labels: list[int | None] = []
        unscaled = {"do_rescale": False, "do_normalize": False}
        for image, label, position in images:
            prepared.append(prepare([image], image_processor, [position], **unscaled)[0])
            kept.append(_pixels(_limited(image, size), channels=len(prepared[-1])))
            self.labels.append(label)
        self.scale, self.shift = (value.to(device) for value in _scaling(image_processor, size))
        self.kept, self.prepared = near(kept, device), near(prepared, device)

    def __len__(self) -> int:
        return len(self.kept)

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> Tensor:
        """One random view of each image named: float32 (images, channels, height, width)."""
        draws = torch.rand(len(indices), 5, generator=generator).tolist()
        views = [self._view(self.kept[index], *own) for index, own in zip(indices, draws, strict=True)]
        return self._scaled(torch.stack(views))

    def plain(self, indices: Sequence[int]) -> Tensor:
        """The images named as the processor prepares them: float32 (images, channels, height, width)."""
        return self._scaled(torch.stack([self.prepared[index] for index in indices]))

    def _view(self, image: Tensor, area: float, shape: float, left: float, top: float, flip: float) -> Tensor:
        """From an image (channels, height, width) and five draws from [0, 1), still in 8-bit units."""
        height, width = image.shape[1:]
        ratio = math.exp(math.log(CROP_RATIO[0]) + shape * math.log(CROP_RATIO[1] / CROP_RATIO[0]))
        pixels = width * height * (CROP_AREA[0] + area * (CROP_AREA[1] - CROP_AREA[0]))
        crop_height = min(max(round(math.sqrt(pixels / ratio)), 1), height)
        crop_width = min(max(round(math.sqrt(pixels * ratio)), 1), width)
        y, x = int(top * (height - crop_height + 1)), int(left * (width - crop_width + 1))
        crop = image[None, :, y : y + crop_height, x : x + crop_width].float()
        view = interpolate(crop, self.size, mode="bicubic", antialias=True)[0].clamp_(0, 255)
        return view.flip(-1) if flip < 0.5 else view

    def _scaled(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.device).float() * self.scale + self.shift


def _scaling(image_processor: Any, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What the processor does to 8-bit pixels that need no resizing: factor and summand (channels, 1, 1)."""
    ends = [Image.new("RGB", size[::-1], (value,) * 3) for value in (0, 255)]
    black, white = prepare(ends, image_processor, [0, 1], do_resize=False, do_center_crop=False)[:, :, :1, :1]
    return (white - black) / 255, black


def _limited(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    scale = KEPT_SIZE * max(size) / min(image.size)
    if scale >= 1:
        return image
    return image.resize((round(scale * image.width), round(scale * image.height)), Image.Resampling.BICUBIC)


def _pixels(image: Image.Image, channels: int) -> Tensor:
    """8-bit (channels, height, width)."""
    pixels = np.array(image if channels == 3 else image.convert("L"))
    return torch.from_numpy(pixels).reshape(image.height, image.width, channels).permute(2, 0, 1).contiguous()
