"""From what a data set holds of an image to its pixels: decoded, turned upright, in RGB."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import RunError, reason, without_secrets


class UnreadableImageError(Exception):
    """An image that cannot be decoded."""


def decode_image(encoded: bytes) -> Image.Image:
    """The image in an encoded file (JPEG, PNG, …), upright as its EXIF data say and in RGB."""
    try:
        image = Image.open(io.BytesIO(encoded))
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise UnreadableImageError("cannot identify image file") from error
    except Exception as error:  # Pillow's readers raise nearly anything on a damaged file
        raise UnreadableImageError(f"damaged: {reason(error)}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255 instead of scaling
        image = Image.fromarray((np.asarray(image, np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def encoded_image(value: Any) -> bytes:
    """The encoded file behind an undecoded image cell."""
    data, path = (value or {}).get("bytes"), (value or {}).get("path")
    if data is not None:
        return data
    if path is None:
        raise UnreadableImageError("the cell is empty")
    if "://" in path:
        return _download(path)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UnreadableImageError(reason(error)) from error


def _download(url: str) -> bytes:
    try:
        with fsspec.open(url, "rb") as file:
            return file.read()
    except Exception as error:  # each file system and HTTP client has errors of its own
        raise RunError(f"'{url}': cannot be downloaded ({reason(error)}).") from error


def name_of(value: Any, location: str) -> str:
    """An address, or a path inside the data set; of any other path only the last part, since records are published."""
    path = (value or {}).get("path")
    if not path:
        return ""
    if "://" not in path:
        inside = Path(path).is_relative_to(location)
        path = str(Path(path).relative_to(location)) if inside else Path(path).name
    return f" ({without_secrets(path)})"
