"""Whether the disk has room for what a run will write."""

from __future__ import annotations

import shutil
from pathlib import Path

from .errors import UserError


def require_room(folder: Path, needed: int, what: str) -> None:
    """Raises UserError where the disk of `folder`, which need not be there yet, has less than `needed` bytes left for
    `what`."""
    free = shutil.disk_usage(next(parent for parent in folder.resolve().parents if parent.is_dir())).free
    if free < needed:
        raise UserError(
            f"The disk of '{folder}' has {free / 1e6:.0f} MB free, but {what} needs {needed / 1e6:.0f} MB: make room, "
            "or choose another disk."
        )
