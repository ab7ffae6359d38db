"""The cells of a comparison, method by size, and what is kept of them on disk."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .dense import DenseSource
from .errors import UserError, reason
from .images import ImageStream
from .recipe import OURS, CompressionRecipe

_FORMAT = 1


@dataclass(frozen=True)
class Method:
    """A preset and what repairs the model afterwards; written "svd", "corp/gradient" or "mixed-rank/closed-form"."""

    preset: str
    compensation: str

    @classmethod
    def parse(cls, name: str) -> Method:
        """Without a compensation it is the preset's own. Raises UserError for a method that no recipe allows."""
        preset, _, compensation = name.strip().partition("/")
        recipe = CompressionRecipe(reduction=0.0, preset=preset, compensation=compensation or None)
        return cls(preset, str(recipe.compensation))

    @property
    def ours(self) -> bool:
        return self.preset == OURS

    @property
    def name(self) -> str:
        return self.preset if self.compensation == "none" and not self.ours else f"{self.preset}/{self.compensation}"

    def recipe(self, base: CompressionRecipe, reduction: float) -> CompressionRecipe:
        """`base` for this method and size; how long distillation takes does not count where there is none."""
        recipe = replace(base, reduction=reduction, preset=self.preset, compensation=self.compensation)
        if self.compensation == "distill":
            return recipe
        plain = CompressionRecipe
        return replace(recipe, distill_epochs=plain.distill_epochs, distill_lr=plain.distill_lr)


@dataclass(frozen=True)
class Cell:
    """One model to measure. recipe: None for the dense model. quantised: "int8", "hqq4" or None."""

    method: str
    size: float
    recipe: CompressionRecipe | None
    quantised: str | None = None


class Store:
    """One JSON file for each cell, named by what it is and by a hash of everything that its result depends on."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._about = folder, about

    def finished(self, cell: Cell) -> bool:
        return self._path(cell).is_file() and bool(self.read(cell)["final"])

    def read(self, cell: Cell) -> dict[str, Any]:
        path = self._path(cell)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"'{path}' is not valid JSON ({reason(error)}): delete it to measure it again.") from error

    def write(self, cell: Cell, record: dict[str, Any]) -> None:
        path = self._path(cell)
        text = json.dumps({**asdict(cell), **record}, indent=2, ensure_ascii=False, allow_nan=False)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, path)

    def _path(self, cell: Cell) -> Path:
        whole = json.dumps({"format": _FORMAT, **self._about, **asdict(cell)}, sort_keys=True)
        digest = hashlib.sha256(whole.encode()).hexdigest()
        parts = (cell.method.replace("/", "+"), f"{cell.size:g}", cell.quantised, digest[:16])
        return self._folder / ("_".join(part for part in parts if part) + ".json")


def common_ground(dense: DenseSource, calibration: ImageStream, dataset: ImageStream) -> dict[str, Any]:
    """What all cells share. Paths do not count: the same weights and images may move."""
    return {
        "weights_sha256": dense.weights_sha256,
        "image_processor_sha256": hashlib.sha256(dense.preprocessor_config or b"").hexdigest(),
        "calibration": _images(calibration),
        "dataset": _images(dataset),
    }


def _images(stream: ImageStream) -> dict[str, Any]:
    """The description of a stream; local data by names and sizes of the files, so that nothing need be decoded."""
    path = Path(stream.description["location"])
    if not path.exists():
        return stream.description
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    listing = "\n".join(f"{file.relative_to(path.parent).as_posix()} {file.stat().st_size}" for file in files)
    return {**stream.description, "location": path.name, "files": hashlib.sha256(listing.encode()).hexdigest()}
