"""Random views of the calibration images: crops and flips, prepared as the checkpoint's image processor does.

Views are made where the model runs. A crop brought to the model's size is two matrix products, one along the rows and
one along the columns, with the weights of an antialiased bicubic filter (Keys 1981, a = -1/2) as Pillow has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from .images import LabelledImage, prepare
from .memory import near

CROP_AREA = (0.35, 1.0)  # share of the image's area
CROP_RATIO = (3 / 4, 4 / 3)  # width to height
# Images are kept at no more than this many times the model's input size, which bounds memory.
KEPT_SIZE = 1.25
_SUPPORT = 2.0  # of the bicubic filter, in pixels of the coarser of the two grids


class RandomViews:
    """The images of a stream, decoded once and kept small, and random views of them.

    image_processor: says how pixels are scaled. size: (height, width) of the model's input, in pixels. device: where
    views are made.
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
        self.scale, self.shift = _scaling(image_processor, size)
        self.kept, self.prepared = near(kept, device), near(prepared, device)

    def __len__(self) -> int:
        return len(self.kept)

    def batch(self, indices: Sequence[int], generator: torch.Generator) -> Tensor:
        """One random view of each image named: float32 (images, channels, height, width)."""
        images = [self.kept[index].to(self.device) for index in indices]
        sizes = torch.tensor([image.shape[-2:] for image in images])
        boxes, flipped = _crops(sizes, torch.rand(len(images), 5, generator=generator))
        height, width = sizes.amax(0).tolist()
        stacked = torch.stack([pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images])
        boxes, sizes, flipped = (values.to(self.device) for values in (boxes, sizes, flipped))
        rows = _resampling(boxes[:, 0], boxes[:, 2], sizes[:, 0], height, self.size[0])
        columns = _resampling(boxes[:, 1], boxes[:, 3], sizes[:, 1], width, self.size[1])
        columns = torch.where(flipped[:, None, None], columns.flip(1), columns)
        views = rows.unsqueeze(1) @ stacked.float() @ columns.mT.unsqueeze(1)
        return self._scaled(views.clamp_(0, 255))

    def plain(self, indices: Sequence[int]) -> Tensor:
        """The images named as the processor prepares them: float32 (images, channels, height, width)."""
        return self._scaled(torch.stack([self.prepared[index].to(self.device) for index in indices]).float())

    def _scaled(self, pixels: Tensor) -> Tensor:
        return pixels * self.scale.to(self.device) + self.shift.to(self.device)


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


def _crops(sizes: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes (images, 4), each top, left, height and width in pixels, and which are flipped, from sizes (images, 2) and
    uniform draws (images, 5)."""
    area, shape, left, top, flip = draws.unbind(1)
    height, width = sizes.unbind(1)
    ratio = torch.exp(math.log(CROP_RATIO[0]) + shape * math.log(CROP_RATIO[1] / CROP_RATIO[0]))
    pixels = height * width * (CROP_AREA[0] + area * (CROP_AREA[1] - CROP_AREA[0]))
    crop_height, crop_width = (pixels / ratio).sqrt().minimum(height), (pixels * ratio).sqrt().minimum(width)
    boxes = torch.stack((top * (height - crop_height), left * (width - crop_width), crop_height, crop_width), 1)
    return boxes, flip < 0.5


def _resampling(start: Tensor, length: Tensor, limit: Tensor, inputs: int, outputs: int) -> Tensor:
    """Weights (images, outputs, inputs) that bring the pixels of an interval to `outputs` pixels, one interval each.

    start, length: of the intervals, in pixels. limit: pixels at and after it are padding and get no weight.
    """
    start, length, limit = (values[:, None, None] for values in (start, length, limit))
    step = length / outputs
    centres = start + (torch.arange(outputs, device=start.device)[:, None] + 0.5) * step
    places = torch.arange(inputs, device=start.device)
    weights = _cubic((places + 0.5 - centres) / step.clamp_min(1.0)).masked_fill_(places >= limit, 0.0)
    return weights / weights.sum(-1, keepdim=True)


def _cubic(distance: Tensor) -> Tensor:
    x = distance.abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < _SUPPORT, far, torch.zeros_like(x)))
