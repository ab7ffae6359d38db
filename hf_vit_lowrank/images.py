"""From a data set to a stream of images, in a fixed order and in shares for several processes."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset, Features, IterableDataset
from datasets import Image as ImageFeature
from datasets.distributed import split_dataset_by_node
from PIL import Image

from .errors import RunError, UserError, reason
from .image_columns import declared, find_image_column, find_label_column
from .image_decoding import UnreadableImageError, decode_image, encoded_image, name_of
from .image_sources import location_and_split, no_images, open_source, pick_split

logger = logging.getLogger(__name__)

UNREADABLE_SHARE = 0.01


class LabelledImage(NamedTuple):
    """One image: PIL, RGB, upright. `position` counts from 0 in the order of the stream, unreadable images included."""

    image: Image.Image
    label: int | None
    position: int


@dataclass(frozen=True)
class Share:
    """Whose part of a stream: batch number `index` of every `count` batches of `batch_size` images.

    in_order: also of data that are streamed, all of which every process then reads.
    """

    index: int
    count: int
    batch_size: int
    in_order: bool = False

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
                encoded = encoded_image(row[self._image_column])
                image = decode_image(encoded)
            except UnreadableImageError as error:
                self._skip(f"image {position}{name_of(row[self._image_column], self._location)}: {error}")
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
        where they are streamed each process reads shards of its own, or every `count`-th image, if not `in_order`.
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
            raise no_images(self._location, self.description["split"])
        self._check_share(tried)
        if read == 0:
            raise UserError(f"'{self._location}': no image can be read: {'; '.join(self.skipped)}.")
        if self.skipped:
            logger.warning("%s: skipped %d unreadable: %s", self._location, len(self.skipped), "; ".join(self.skipped))


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
    location, split = location_and_split(str(location), split)
    source = open_source(location, config, shuffled=seed is not None)
    name = pick_split(source.splits, split, location, prefer_train=seed is not None)
    data = declared(source.open(name))
    features = data.features or Features()
    image_column = find_image_column(features, image_column, location)
    label_column = find_label_column(features, label_column, location)
    label = features[label_column] if label_column else None
    available = source.count(name, data)
    if available == 0:
        raise no_images(location, name)
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


def _ordered_rows(
    data: Dataset | IterableDataset, seed: int | None, shuffle_buffer: int, samples: int | None
) -> Callable[[Share], Iterable[dict[str, Any]]]:
    """A function that starts the rows of a share over, in the same order every time."""
    if isinstance(data, IterableDataset):
        ordered = data if seed is None else data.shuffle(seed=seed, buffer_size=shuffle_buffer)

        def streamed(share: Share) -> Iterable[dict[str, Any]]:
            if share == WHOLE:
                return ordered
            if share.in_order:
                rows = enumerate(islice(ordered, samples))
                return (row for place, row in rows if place // share.batch_size % share.count == share.index)
            own = split_dataset_by_node(ordered, share.index, share.count)
            return islice(own, None if samples is None else share.number_of(samples))

        return streamed
    order = np.arange(len(data)) if seed is None else np.random.default_rng(seed).permutation(len(data))

    def indexed(share: Share) -> Iterable[dict[str, Any]]:
        # Alone, an image that cannot be read is replaced by one behind the samples; other processes know nothing of it.
        places = range(len(order)) if share == WHOLE else share.of(min(samples or len(order), len(order)))
        return data if seed is None and share == WHOLE else (data[int(order[place])] for place in places)

    return indexed
