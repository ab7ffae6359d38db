"""Files and folders: whether what a run will write may be written and has room, and what files hold."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from .errors import UserError


def require_writable(path: Path) -> None:
    """Raises UserError where a file or folder, which need not be there yet, may not be written."""
    nearest = path if path.exists() else next(parent for parent in path.resolve().parents if parent.exists())
    if not os.access(nearest, os.W_OK | (os.X_OK if nearest.is_dir() else 0)):
        raise UserError(f"'{nearest}' may not be written to: choose another place.")


def require_room(folder: Path, needed: int, what: str) -> None:
    """Raises UserError where the disk of `folder`, which need not be there yet, has less than `needed` bytes left for
    `what`."""
    free = shutil.disk_usage(next(parent for parent in folder.resolve().parents if parent.is_dir())).free
    if free < needed:
        raise UserError(
            f"The disk of '{folder}' has {free / 1e6:.0f} MB free, but {what} needs {needed / 1e6:.0f} MB: make room, "
            "or choose another disk."
        )


def overlap(first: str | Path, second: str | Path) -> bool:
    """Whether one of two paths is the other, holds it or lies in it."""
    one, other = Path(first).resolve(), Path(second).resolve()
    return one == other or one in other.parents or other in one.parents


def sha256(*files: Path) -> str:
    """Of the files' bytes, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
