"""Which columns of a data set hold the images and their labels."""

from __future__ import annotations

import logging
from typing import Any

from datasets import ClassLabel, Dataset, Features, IterableDataset, Value
from datasets import Image as ImageFeature

from .errors import UserError

logger = logging.getLogger(__name__)


def declared(data: Dataset | IterableDataset) -> Any:
    """The same data with known columns: where a stream's files do not declare theirs, those of its first rows."""
    return data._resolve_features() if data.features is None else data


def find_image_column(features: Features, wanted: str | None, location: str) -> str:
    columns = ", ".join(f"{name} ({_type_name(feature)})" for name, feature in features.items()) or "none"
    if wanted is not None:
        if wanted in features and _may_hold_images(features[wanted]):
            return wanted
        problem = "holds no images" if wanted in features else "does not exist"
        raise UserError(f"'{location}': the image column {wanted!r} {problem}; the columns are: {columns}.")
    found = [name for name, feature in features.items() if _is_image(feature)]
    if len(found) == 1:
        return found[0]
    for usual in ("image", "img"):
        if usual in found:
            return usual
    problem = "several image columns" if found else "no image column"
    raise UserError(f"'{location}': {problem}; name the image column among: {columns}.")


def _is_image(feature: Any) -> bool:
    """Declared as images, or stored as images are but without the declaration (parquet from elsewhere)."""
    return isinstance(feature, ImageFeature) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def _may_hold_images(feature: Any) -> bool:
    return _is_image(feature) or (isinstance(feature, Value) and feature.dtype in ("binary", "large_binary", "string"))


def _type_name(feature: Any) -> str:
    return feature.dtype if isinstance(feature, Value) else type(feature).__name__


def find_label_column(features: Features, wanted: str | None, location: str) -> str | None:
    if wanted is not None:
        if wanted in features and (isinstance(features[wanted], ClassLabel) or _is_integer(features[wanted])):
            return wanted
        problem = "holds neither class labels nor integers" if wanted in features else "does not exist"
        raise UserError(f"'{location}': the label column {wanted!r} {problem}; the columns are: {', '.join(features)}.")
    usual = [name for name in ("label", "labels") if name in features]
    named = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    for name in usual:
        if name in named:
            return name
    if len(named) > 1:
        logger.warning("%s: label columns %s; none is used, name one to use it", location, ", ".join(named))
    if named:
        return named[0] if len(named) == 1 else None
    return next((name for name in usual if _is_integer(features[name])), None)


def _is_integer(feature: Any) -> bool:
    return isinstance(feature, Value) and "int" in feature.dtype
