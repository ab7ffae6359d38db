"""What an unfinished run leaves on disk, so that the same command goes on where it was: its finished stages."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from . import processes
from .candidates.block import BlockCandidates
from .candidates.elimination import Elimination
from .candidates.query_key import QueryKeyCandidate, QueryKeyLayer
from .candidates.value_output import ValueOutputCandidate
from .disk import require_room
from .errors import RunError, UserError, reason
from .statistics import BlockStatistics, Moments, TokenGroups

Result = TypeVar("Result")

_INPUTS = "run.json"
# Besides tensors and plain values, stages may hold these and nothing else: reading a run folder never runs code.
_STORED: list[Any] = [
    *(BlockStatistics, TokenGroups, Moments),
    *(BlockCandidates, QueryKeyLayer, QueryKeyCandidate, ValueOutputCandidate, Elimination),
]


class RunFolder:
    """A folder with one file per finished stage; without a folder nothing is kept and every stage is made anew.

    Of several processes the main one alone reads and writes the folder, and tells the others.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder

    def require(self, **inputs: Any) -> None:
        """Note what the run is made from (JSON-able), or see that it is the same as when the run began.

        Raises UserError naming what differs.
        """
        if self.folder is None:
            return
        noted = processes.from_main(_read_inputs(self.folder) if processes.is_main() else {})
        for name, value in json.loads(json.dumps(inputs)).items():
            if difference := _difference(name, noted.setdefault(name, value), value):
                raise UserError(
                    f"'{self.folder}' holds an unfinished run with another {difference}: give the command of that run "
                    "to finish it, pass --restart to throw it away, or choose another output."
                )
        self._write(_INPUTS, lambda file: file.write_text(json.dumps(noted, indent=2, sort_keys=True) + "\n"))

    def require_room(self, needed: int) -> None:
        """Raises UserError where the disk has less than `needed` bytes left."""
        if self.folder is not None:
            require_room(self.folder, needed, "the run, until it is done,")

    def part(self, name: str) -> RunFolder:
        """For the stages of one of several results that a run makes."""
        return RunFolder(self.folder and self.folder / name)

    def has(self, stage: str) -> bool:
        """Whether that stage was finished."""
        return self.folder is not None and processes.from_main(self._file(stage).is_file())

    def is_begun(self) -> bool:
        """Whether any stage, or block of one, was finished; for the main process alone."""
        return self.folder is not None and any(self.folder.glob("**/*.pt"))

    def load(self, stage: str) -> Any:
        """The result of a finished stage. Raises RunError where its file cannot be read."""
        return processes.from_main(self._read(stage) if processes.is_main() else None)

    def _read(self, stage: str) -> Any:
        file = self._file(stage)
        try:
            with torch.serialization.safe_globals(_STORED):
                return torch.load(file, weights_only=True)
        except Exception as error:
            raise RunError(
                f"'{file}' of an unfinished run cannot be read ({reason(error)}): pass --restart."
            ) from error

    def save(self, stage: str, result: Any) -> None:
        """Raises RunError where the disk fails."""
        if self.folder is not None:
            self._write(self._file(stage).name, lambda file: torch.save(result, file))

    def stage(self, name: str, make: Callable[[], Result]) -> Result:
        """The result of a stage: as it was finished before, or made and kept."""
        if self.has(name):
            return self.load(name)
        result = make()
        self.save(name, result)
        return result

    def parked(self, names: Sequence[str]) -> Sequence[Any]:
        """Results of finished stages, read from disk one at a time, each time one is asked for."""
        return _Parked(self, names)

    def remove(self) -> None:
        """Throw the run away. Raises UserError where the folder holds something else than a run."""
        if self.folder is None or not self.folder.exists():
            return
        if any(self.folder.iterdir()) and not (self.folder / _INPUTS).is_file():
            raise UserError(f"'{self.folder}' is no run folder of hf-vit-lowrank: move it away.")
        shutil.rmtree(self.folder)

    def _file(self, stage: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{stage}.pt"

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        """Whole or not at all: a file that a killed process left half written never has its final name."""
        assert self.folder is not None
        if not processes.is_main():
            return
        unfinished = self.folder / f"{name}.unfinished"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(unfinished)
            with unfinished.open("rb+") as file:
                os.fsync(file.fileno())
            unfinished.replace(self.folder / name)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            raise RunError(
                f"The run folder '{self.folder}' could not be written to ({reason(error)}): make room, then give the "
                "same command again, which goes on from here."
            ) from error


@contextmanager
def run_beside(output: Path, restart: bool) -> Iterator[RunFolder]:
    """The run folder of a command that writes `output`, hidden beside it: there until the command is through.

    restart: throw away what an unfinished run left. Raises UserError where something else has the folder's name.
    """
    run = RunFolder(output.absolute().parent / f".{output.name}.run")
    if processes.is_main() and (restart or not run.is_begun()):
        run.remove()
    try:
        yield run
    except UserError:
        # What was refused before the long work must not stand in the way of its correction.
        if processes.is_main() and not run.is_begun():
            run.remove()
        raise
    if processes.is_main():
        run.remove()


class _Parked(Sequence[Any]):
    def __init__(self, run: RunFolder, names: Sequence[str]):
        self.run, self.names = run, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        return self.run.load(self.names[index])


def _read_inputs(folder: Path) -> dict[str, Any]:
    file = folder / _INPUTS
    if not file.exists():
        return {}
    try:
        inputs = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"'{file}' of an unfinished run cannot be read ({reason(error)}): pass --restart.") from error
    return dict(inputs)


def _difference(name: str, noted: Any, given: Any) -> str | None:
    """The first value that differs, as "recipe.seed (0 there, 1 here)"."""
    if isinstance(noted, dict) and isinstance(given, dict):
        below = (_difference(f"{name}.{key}", noted.get(key), given.get(key)) for key in sorted({*noted, *given}))
        return next(filter(None, below), None)
    return None if noted == given else f"{name} ({_short(noted)} there, {_short(given)} here)"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:20]}…"
