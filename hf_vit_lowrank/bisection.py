"""Where something changes, by halving."""

from __future__ import annotations

from collections.abc import Callable

# More than the bits of a float64, so that no value is missed.
HALVINGS = 60


def last_that_fits(fits: Callable[[float], bool], inside: float, outside: float, halvings: int = HALVINGS) -> float:
    """The value nearest to `outside`, which does not fit, that does, as `inside` does; between them it changes once."""
    for _ in range(halvings):
        middle = (inside + outside) / 2
        if fits(middle):
            inside = middle
        else:
            outside = middle
    return inside
