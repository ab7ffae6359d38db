"""A progress bar on stderr: a live bar in a terminal, a line a minute in a log, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

Item = TypeVar("Item")

_LOG_INTERVAL = 60.0  # seconds between two lines where stderr is no terminal
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


def quiet() -> _Quiet:
    """Silence `track`: from the call on, or as `with quiet():` for the length of the block."""
    return _Quiet()


class _Quiet:
    def __init__(self) -> None:
        self._token = _quiet.set(True)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        _quiet.reset(self._token)


def say(line: str) -> None:
    """A line on stderr, unless quiet."""
    if not _quiet.get():
        print(line, file=sys.stderr)


class _RateColumn(ProgressColumn):
    """Units per second."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        super().__init__()

    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        return Text("" if rate is None else f"{rate:.1f} {self.unit}/s", style="progress.data.speed")


def track(
    iterable: Iterable[Item],
    description: str,
    total: int | None,
    unit: str = "images",
    size: Callable[[Item], int] = lambda item: 1,
) -> Iterator[Item]:
    """Yield the items of `iterable`, showing units done and total, units per second and time left.

    `total` is counted in units (None: unknown) and `size` says how many units an item is worth.
    """
    if _quiet.get():
        yield from iterable
    elif (console := Console(stderr=True)).is_terminal:
        yield from _bar(iterable, description, total, unit, size, console)
    else:
        yield from _log(iterable, description, total, unit, size)


def _bar(
    iterable: Iterable[Item],
    description: str,
    total: int | None,
    unit: str,
    size: Callable[[Item], int],
    console: Console,
) -> Iterator[Item]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total)
        for item in iterable:
            yield item
            progress.advance(task, size(item))


def _log(
    iterable: Iterable[Item], description: str, total: int | None, unit: str, size: Callable[[Item], int]
) -> Iterator[Item]:
    start = last = time.monotonic()
    done = 0

    def report(now: float) -> None:
        seconds = now - start
        of_total = f"/{total}" if total and done < total else ""
        rate = done / max(seconds, 1e-9)
        print(f"{description}: {done}{of_total} {unit} in {seconds:.1f} s, {rate:.1f} {unit}/s", file=sys.stderr)

    for item in iterable:
        yield item
        done += size(item)
        if time.monotonic() - last > _LOG_INTERVAL:
            last = time.monotonic()
            report(last)
    report(time.monotonic())
