"""Data sets of images, found by their location: on the hub, in folders, in parquet files, as `datasets` saves them."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, load_dataset, load_from_disk
from datasets import Image as ImageFeature
from pyarrow import parquet

from .errors import UserError, as_user_error

# Parquet files larger than this in all are streamed; smaller ones go through the cache of `datasets` (memory-mapped
# Arrow), which allows an exact shuffle.
CACHE_LIMIT_BYTES = 10_000_000_000

_IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".gif"),
    *(".tif", ".tiff", ".jp2", ".ppm", ".pgm", ".pbm"),
}
_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True)
class ImageSource:
    """A data set whose splits are known but not read yet."""

    splits: list[str]
    open: Callable[[str], Any]  # split -> Dataset or IterableDataset
    count: Callable[[str, Any], int | None]  # split, opened data -> number of rows
    on_hub: bool = False


def no_images(location: str, split: str) -> UserError:
    return UserError(f"'{location}': the data set (split {split}) has no images.")


def location_and_split(location: str, split: str | None) -> tuple[str, str | None]:
    location = os.path.expanduser(location)
    base, colon, suffix = location.rpartition(":")
    if not colon or os.path.exists(location) or "/" in suffix or "\\" in suffix:
        return location, split
    if split not in (None, suffix):
        raise UserError(f"'{location}' names the split {suffix}, but {split} was asked for; give one of the two.")
    return base, suffix


def open_source(location: str, config: str | None, shuffled: bool) -> ImageSource:
    path = Path(location)
    pattern = glob.has_magic(location) and not path.exists()
    if not pattern and not path.exists():
        if path.is_absolute() or location.startswith(".") or location.count("/") > 1 or path.suffix == ".parquet":
            raise UserError(f"'{location}': there is no such file or folder.")
        return _hub_source(location, config)
    if config is not None:
        raise UserError(f"'{location}': only data sets on the hub have configurations; leave config '{config}' out.")
    if path.is_dir():
        return _folder_source(path, shuffled)
    if pattern:
        files = [Path(file) for file in sorted(glob.glob(location, recursive=True)) if os.path.isfile(file)]
        return _parquet_source(location, _split_files(files), shuffled)
    return _parquet_source(location, _one_file_splits(path), shuffled)


def _hub_source(location: str, config: str | None) -> ImageSource:
    missing = "is no file or folder here, and the hub did not open it as a data set: check spelling, network and access"
    with as_user_error(f"'{location}' {missing}"):
        splits = load_dataset(location, config, streaming=True)

    def count(split: str, data: IterableDataset) -> int | None:
        known = (data.info.splits or {}).get(split)
        return known.num_examples or None if known else None

    return ImageSource(list(splits), splits.__getitem__, count, on_hub=True)


def _folder_source(folder: Path, shuffled: bool) -> ImageSource:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _saved_source(folder)
    files = _visible_files(folder)
    parquet_files = [file for file in files if file.suffix == ".parquet"]
    if parquet_files:
        return _parquet_source(str(folder), _split_files(parquet_files, folder), shuffled)
    images = [file for file in files if file.suffix.lower() in _IMAGE_SUFFIXES]
    if not images:
        raise UserError(
            f"'{folder}': no image, no parquet file and no data set written by datasets.save_to_disk is in this folder."
        )
    return _image_folder_source(folder, images)


def _visible_files(folder: Path) -> list[Path]:
    found: list[Path] = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in sorted(files) if not name.startswith(".")]
    return found


def _saved_source(folder: Path) -> ImageSource:
    with as_user_error(f"'{folder}': the saved data set cannot be read; save it again"):
        saved = load_from_disk(str(folder))
    if not isinstance(saved, DatasetDict):
        saved = DatasetDict({str(saved.split or "train"): saved})
    return ImageSource(list(saved), saved.__getitem__, _number_of_rows)


def _image_folder_source(folder: Path, images: list[Path]) -> ImageSource:
    """Folders of the first level are splits where all are called like splits, and labels otherwise."""
    tops: dict[str, list[Path]] = {}
    for image in images:
        parts = image.relative_to(folder).parts
        tops.setdefault(parts[0] if len(parts) > 1 else "", []).append(image)
    if all(top.lower() in _SPLITS for top in tops):  # all: a class, too, may be called "train"
        return ImageSource(list(tops), lambda split: _image_dataset(folder / split, tops[split]), _number_of_rows)
    return ImageSource(["train"], lambda split: _image_dataset(folder, images), _number_of_rows)


def _number_of_rows(split: str, data: Dataset) -> int:
    return len(data)


def _image_dataset(root: Path, images: list[Path]) -> Dataset:
    columns: dict[str, list[Any]] = {"image": [{"bytes": None, "path": str(image)} for image in images]}
    features = {"image": ImageFeature(decode=False)}
    parts = [image.relative_to(root).parts for image in images]
    if all(len(part) > 1 for part in parts):
        label = {name: index for index, name in enumerate(sorted({part[0] for part in parts}))}
        columns["label"] = [label[part[0]] for part in parts]
        features["label"] = ClassLabel(names=list(label))
    return Dataset.from_dict(columns, features=Features(features))


def _one_file_splits(file: Path) -> dict[str, list[Path]]:
    """A lone file may be called by the split in its name, or "train" as `datasets` calls it."""
    if file.suffix != ".parquet":
        raise UserError(f"'{file}': neither a folder nor a parquet file.")
    return {**_split_files([file]), "train": [file]}


def _split_files(files: list[Path], root: Path | None = None) -> dict[str, list[Path]]:
    """Files by split: the one their name begins with, or else a folder below `root`, or else "train"."""
    splits: dict[str, list[Path]] = {}
    for file in files:
        folders = file.relative_to(root).parts[:-1] if root else ()
        words = [re.split(r"[^a-zA-Z]", file.stem)[0], *reversed(folders)]
        named = [_SPLITS[word.lower()] for word in words if word.lower() in _SPLITS]
        splits.setdefault(named[0] if named else "train", []).append(file)
    return splits


def _parquet_source(location: str, splits: dict[str, list[Path]], shuffled: bool) -> ImageSource:
    if not splits:
        raise UserError(f"'{location}': no file fits this pattern.")
    broken = f"'{location}': the parquet files cannot be read; get intact copies"

    def count(split: str, data: Any = None) -> int:
        with as_user_error(broken):
            return sum(parquet.read_metadata(file).num_rows for file in splits[split])

    def open_split(split: str) -> Dataset | IterableDataset:
        if not count(split):  # `datasets` would call an empty split unknown
            raise no_images(location, split)
        files = splits[split]
        # Reading in order needs no index, so no copy in the cache either.
        streaming = not shuffled or sum(file.stat().st_size for file in files) > CACHE_LIMIT_BYTES
        patterns = {split: [glob.escape(str(file)) for file in files]}
        with as_user_error(broken):
            return load_dataset("parquet", data_files=patterns, split=split, streaming=streaming)

    return ImageSource(list(splits), open_split, count)


def pick_split(splits: list[str], wanted: str | None, location: str, *, prefer_train: bool) -> str:
    usual = {_SPLITS.get(name.lower(), name): name for name in reversed(splits)}
    if wanted is not None:
        if wanted in splits:
            return wanted
        if (known := _SPLITS.get(wanted.lower())) in usual:
            return usual[known]
        raise UserError(f"'{location}': there is no split {wanted!r}; there are: {', '.join(splits)}.")
    order = ("train", "validation", "test") if prefer_train else ("validation", "test", "train")
    for name in order:
        if name in usual:
            return usual[name]
    if len(splits) == 1:
        return splits[0]
    raise UserError(f"'{location}': name one of the splits: {', '.join(splits)}.")
