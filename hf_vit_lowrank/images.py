"""From a data set to images: found, decoded, turned upright, in RGB."""

from __future__ import annotations

import glob
import hashlib
import io
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, IterableDataset, Value, load_dataset, load_from_disk
from datasets import Image as ImageFeature
from datasets.distributed import split_dataset_by_node
from PIL import Image, ImageOps, UnidentifiedImageError
from pyarrow import parquet

from .errors import RunError, UserError, as_user_error, reason, without_secrets

logger = logging.getLogger(__name__)

UNREADABLE_SHARE = 0.01
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


# ---------------------------------------------------------------------------------------------------------- the stream


class LabelledImage(NamedTuple):
    """One image: PIL, RGB, upright. `position` counts from 0 in the order of the stream, unreadable images included."""

    image: Image.Image
    label: int | None
    position: int


@dataclass(frozen=True)
class Share:
    """Whose part of a stream: batch number `index` of every `count` batches of `batch_size` images."""

    index: int
    count: int
    batch_size: int

    def of(self, images: int) -> list[int]:
        """The positions, among so many images, that belong to this share."""
        batches = range(self.index * self.batch_size, images, self.count * self.batch_size)
        return [place for start in batches for place in range(start, min(start + self.batch_size, images))]

    def number_of(self, images: int) -> int:
        """How many of a stream's images, whose order is not to be had, belong to this share."""
        return images // self.count + (self.index < images % self.count)


WHOLE = Share(0, 1, 1)


class ImageStream:
    """The images of one split, in a fixed order; every iteration gives the same ones again.

    `description`: where the images come from (JSON-able). `label_names`: class names by label, or None.
    `length`: number of images expected, or None. `skipped`: the unreadable images of the current or last iteration.
    `sha256`: hash of the encoded images of the last whole iteration, in order.

    Iterating raises UserError when there is no image at all or when more than one image and more than 1 % of them are
    unreadable, and RunError when the source breaks off (network, disk).
    """

    def __init__(
        self,
        rows: Callable[[Share], Iterable[dict[str, Any]]],
        image_column: str,
        label_column: str | None,
        *,
        description: dict[str, Any],
        label_names: list[str] | None,
        length: int | None,
        samples: int | None,
        share: Share = WHOLE,
    ) -> None:
        self._rows = rows
        self._image_column, self._label_column = image_column, label_column
        self._samples, self._share = samples, share
        self.description = description
        self.label_names = label_names
        self.length = length
        self.skipped: list[str] = []
        self.sha256: str | None = None

    def __iter__(self) -> Iterator[LabelledImage]:
        self.skipped = []
        digest = hashlib.sha256()
        tried = read = 0
        for position, row in enumerate(self._read_rows()):
            tried += 1
            try:
                encoded = _encoded(row[self._image_column])
                image = decode_image(encoded)
            except _UnreadableImageError as error:
                self._skip(f"image {position}{_name_of(row[self._image_column], self._location)}: {error}")
                continue
            digest.update(encoded)
            read += 1
            yield LabelledImage(image, self._label(row), position)
            if read == self._samples:
                break
        self._finish(tried, read)
        self.sha256 = digest.hexdigest()

    def shared(self, share: Share) -> ImageStream:
        """A part of this stream; the parts of all processes together hold every image once.

        Where the data can be indexed it is whole batches, so that they are the ones that a single process makes;
        where they are streamed each process reads shards of its own, or every `count`-th image.
        """
        return ImageStream(
            self._rows,
            self._image_column,
            self._label_column,
            description=self.description,
            label_names=self.label_names,
            length=None if self.length is None else share.number_of(self.length),
            samples=None,  # the rows of a share end by themselves
            share=share,
        )

    def _read_rows(self) -> Iterator[dict[str, Any]]:
        """The rows; whatever goes wrong in reading the source is no fault of an image and ends the run."""
        done = 0
        try:
            for row in self._rows(self._share):
                yield row
                done += 1
        except Exception as error:  # of datasets, pyarrow, the file system or an HTTP client
            raise RunError(f"'{self._location}': reading broke off after {done} images ({reason(error)}).") from error

    @property
    def _location(self) -> str:
        return self.description["location"]

    def _label(self, row: dict[str, Any]) -> int | None:
        label = row[self._label_column] if self._label_column else None
        return None if label is None or label < 0 else int(label)  # -1 marks "no label" in test splits

    def _skip(self, what: str) -> None:
        self.skipped.append(what)
        if self.length is not None:
            self._check_share(self.length)

    def _check_share(self, of: int) -> None:
        if len(self.skipped) > max(1, UNREADABLE_SHARE * of):
            raise UserError(
                f"'{self._location}': {len(self.skipped)} images cannot be read "
                f"(more than {UNREADABLE_SHARE:.0%} of {of}): repair or remove {'; '.join(self.skipped[:3])}."
            )

    def _finish(self, tried: int, read: int) -> None:
        if tried == 0:
            if self._share != WHOLE:  # the other processes' shares hold what there is
                return
            raise _no_images(self._location, self.description["split"])
        self._check_share(tried)
        if read == 0:
            raise UserError(f"'{self._location}': no image can be read: {'; '.join(self.skipped)}.")
        if self.skipped:
            logger.warning("%s: skipped %d unreadable: %s", self._location, len(self.skipped), "; ".join(self.skipped))


# ------------------------------------------------------------------------------------------------------------ decoding


class _UnreadableImageError(Exception):
    """An image that cannot be decoded."""


def decode_image(encoded: bytes) -> Image.Image:
    """The image in an encoded file (JPEG, PNG, …), upright as its EXIF data say and in RGB."""
    try:
        image = Image.open(io.BytesIO(encoded))
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise _UnreadableImageError("cannot identify image file") from error
    except Exception as error:  # Pillow's readers raise nearly anything on a damaged file
        raise _UnreadableImageError(f"damaged: {reason(error)}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255 instead of scaling
        image = Image.fromarray((np.asarray(image, np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def _encoded(value: Any) -> bytes:
    """The encoded file behind an undecoded image cell."""
    data, path = (value or {}).get("bytes"), (value or {}).get("path")
    if data is not None:
        return data
    if path is None:
        raise _UnreadableImageError("the cell is empty")
    if "://" in path:
        return _download(path)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise _UnreadableImageError(reason(error)) from error


def _download(url: str) -> bytes:
    try:
        with fsspec.open(url, "rb") as file:
            return file.read()
    except Exception as error:  # each file system and HTTP client has errors of its own
        raise RunError(f"'{url}': cannot be downloaded ({reason(error)}).") from error


def _name_of(value: Any, location: str) -> str:
    """An address, or a path inside the data set; of any other path only the last part, since records are published."""
    path = (value or {}).get("path")
    if not path:
        return ""
    if "://" not in path:
        inside = Path(path).is_relative_to(location)
        path = str(Path(path).relative_to(location)) if inside else Path(path).name
    return f" ({without_secrets(path)})"


# ------------------------------------------------------------------------------------------------------- opening a set


def open_images(
    location: str | os.PathLike[str],
    *,
    config: str | None = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    samples: int | None = None,
    seed: int | None = 0,
    shuffle_buffer: int = 1000,
) -> ImageStream:
    """Open a data set of images.

    `location`: a data set id on the hub (streamed), a folder of images (sub-folders are the labels, or none), a parquet
    file, pattern or folder, or a folder written by `datasets.save_to_disk`; an id or path may end in `:split`.
    `seed`: None keeps the order of the data. An int shuffles: by a permutation where the data can be indexed, by a
    buffer of `shuffle_buffer` images where they are streamed. `samples`: the number of readable images at most.
    Raises UserError for what is not there: data set, split, image column, any image.
    """
    if samples is not None and samples < 1:
        raise UserError(f"samples must be at least 1, not {samples}.")
    location, split = _location_and_split(str(location), split)
    source = _open_source(location, config, for_calibration=seed is not None)
    name = _pick_split(source.splits, split, location, prefer_train=seed is not None)
    data = source.open(name)
    features = _features(data)
    image_column = _find_image_column(features, image_column, location)
    label_column = _find_label_column(features, label_column, location)
    label = features[label_column] if label_column else None
    available = source.count(name, data)
    if available == 0:
        raise _no_images(location, name)
    data = data.select_columns([column for column in (image_column, label_column) if column])
    data = data.cast_column(image_column, ImageFeature(decode=False))  # a broken image must not stop the stream
    sizes = [size for size in (samples, available) if size is not None]
    return ImageStream(
        _ordered_rows(data, seed, shuffle_buffer, samples),
        image_column,
        label_column,
        description={
            "location": location,
            "config": config,
            "split": name,
            "image_column": image_column,
            "label_column": label_column,
            "samples": samples,
            "seed": seed,
            # Not said of local data, so that what is kept under a hash of this description is found as before.
            **({"hub": True} if source.on_hub else {}),
        },
        label_names=list(label.names) if isinstance(label, ClassLabel) else None,
        length=min(sizes) if sizes else None,
        samples=samples,
    )


@dataclass(frozen=True)
class _Source:
    """A data set whose splits are known but not read yet."""

    splits: list[str]
    open: Callable[[str], Any]  # split -> Dataset or IterableDataset
    count: Callable[[str, Any], int | None]  # split, opened data -> number of rows
    on_hub: bool = False


def _no_images(location: str, split: str) -> UserError:
    return UserError(f"'{location}': the data set (split {split}) has no images.")


def _location_and_split(location: str, split: str | None) -> tuple[str, str | None]:
    location = os.path.expanduser(location)
    base, colon, suffix = location.rpartition(":")
    if not colon or os.path.exists(location) or "/" in suffix or "\\" in suffix:
        return location, split
    if split not in (None, suffix):
        raise UserError(f"'{location}' names the split {suffix}, but {split} was asked for; give one of the two.")
    return base, suffix


def _open_source(location: str, config: str | None, for_calibration: bool) -> _Source:
    path = Path(location)
    pattern = glob.has_magic(location) and not path.exists()
    if not pattern and not path.exists():
        if path.is_absolute() or location.startswith(".") or location.count("/") > 1 or path.suffix == ".parquet":
            raise UserError(f"'{location}': there is no such file or folder.")
        return _hub_source(location, config)
    if config is not None:
        raise UserError(f"'{location}': only data sets on the hub have configurations; leave config '{config}' out.")
    if path.is_dir():
        return _folder_source(path, for_calibration)
    if pattern:
        files = [Path(file) for file in sorted(glob.glob(location, recursive=True)) if os.path.isfile(file)]
        return _parquet_source(location, _split_files(files), for_calibration)
    return _parquet_source(location, _one_file_splits(path), for_calibration)


def _hub_source(location: str, config: str | None) -> _Source:
    missing = "is no file or folder here, and the hub did not open it as a data set: check spelling, network and access"
    with as_user_error(f"'{location}' {missing}"):
        splits = load_dataset(location, config, streaming=True)

    def count(split: str, data: IterableDataset) -> int | None:
        known = (data.info.splits or {}).get(split)
        return known.num_examples or None if known else None

    return _Source(list(splits), splits.__getitem__, count, on_hub=True)


def _folder_source(folder: Path, for_calibration: bool) -> _Source:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _saved_source(folder)
    files = _visible_files(folder)
    parquet_files = [file for file in files if file.suffix == ".parquet"]
    if parquet_files:
        return _parquet_source(str(folder), _split_files(parquet_files, folder), for_calibration)
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


def _saved_source(folder: Path) -> _Source:
    with as_user_error(f"'{folder}': the saved data set cannot be read; save it again"):
        saved = load_from_disk(str(folder))
    if not isinstance(saved, DatasetDict):
        saved = DatasetDict({str(saved.split or "train"): saved})
    return _Source(list(saved), saved.__getitem__, _number_of_rows)


def _image_folder_source(folder: Path, images: list[Path]) -> _Source:
    """Folders of the first level are splits where all are called like splits, and labels otherwise."""
    tops: dict[str, list[Path]] = {}
    for image in images:
        parts = image.relative_to(folder).parts
        tops.setdefault(parts[0] if len(parts) > 1 else "", []).append(image)
    if all(top.lower() in _SPLITS for top in tops):  # all: a class, too, may be called "train"
        return _Source(list(tops), lambda split: _image_dataset(folder / split, tops[split]), _number_of_rows)
    return _Source(["train"], lambda split: _image_dataset(folder, images), _number_of_rows)


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


def _parquet_source(location: str, splits: dict[str, list[Path]], for_calibration: bool) -> _Source:
    if not splits:
        raise UserError(f"'{location}': no file fits this pattern.")
    broken = f"'{location}': the parquet files cannot be read; get intact copies"

    def count(split: str, data: Any = None) -> int:
        with as_user_error(broken):
            return sum(parquet.read_metadata(file).num_rows for file in splits[split])

    def open_split(split: str) -> Dataset | IterableDataset:
        if not count(split):  # `datasets` would call an empty split unknown
            raise _no_images(location, split)
        files = splits[split]
        # Reading in order needs no index, so no copy in the cache either.
        streaming = not for_calibration or sum(file.stat().st_size for file in files) > CACHE_LIMIT_BYTES
        patterns = {split: [glob.escape(str(file)) for file in files]}
        with as_user_error(broken):
            return load_dataset("parquet", data_files=patterns, split=split, streaming=streaming)

    return _Source(list(splits), open_split, count)


def _pick_split(splits: list[str], wanted: str | None, location: str, *, prefer_train: bool) -> str:
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


def _features(data: Dataset | IterableDataset) -> Features:
    features = data.features
    if features is None:  # a stream whose files do not declare their columns: look at the first rows
        features = data._resolve_features().features
    return features or Features()


def _find_image_column(features: Features, wanted: str | None, location: str) -> str:
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


def _find_label_column(features: Features, wanted: str | None, location: str) -> str | None:
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


def _ordered_rows(
    data: Dataset | IterableDataset, seed: int | None, shuffle_buffer: int, samples: int | None
) -> Callable[[Share], Iterable[dict[str, Any]]]:
    """A function that starts the rows of a share over, in the same order every time."""
    if isinstance(data, IterableDataset):
        ordered = data if seed is None else data.shuffle(seed=seed, buffer_size=shuffle_buffer)

        def streamed(share: Share) -> Iterable[dict[str, Any]]:
            if share == WHOLE:
                return ordered
            own = split_dataset_by_node(ordered, share.index, share.count)
            return islice(own, None if samples is None else share.number_of(samples))

        return streamed
    order = np.arange(len(data)) if seed is None else np.random.default_rng(seed).permutation(len(data))

    def indexed(share: Share) -> Iterable[dict[str, Any]]:
        # Alone, an image that cannot be read is replaced by one behind the samples; other processes know nothing of it.
        places = range(len(order)) if share == WHOLE else share.of(min(samples or len(order), len(order)))
        return data if seed is None and share == WHOLE else (data[int(order[place])] for place in places)

    return indexed
