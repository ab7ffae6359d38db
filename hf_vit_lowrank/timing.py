"""How long each stage of a run takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

# Of the stages that are being timed, the outermost first: what stages inside of them have taken so far.
_INSIDE: list[float] = []


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the time that the block takes to a stage, but for that of stages inside of it, which are made when first
    asked for."""
    start = time.perf_counter()
    _INSIDE.append(0.0)
    try:
        yield
    finally:
        whole, inside = time.perf_counter() - start, _INSIDE.pop()
        seconds[stage] = seconds.get(stage, 0.0) + whole - inside
        if _INSIDE:
            _INSIDE[-1] += whole
