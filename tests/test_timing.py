"""Every second is counted once."""

from __future__ import annotations

from contextlib import suppress

import pytest

from hf_vit_lowrank import timing


@pytest.fixture
def wait(monkeypatch):
    """Lets so many seconds go by."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def by(seconds: float) -> None:
        now[0] += seconds

    return by


def test_a_stage_inside_of_others_counts_for_itself_alone(wait):
    early, late = {}, {}
    with timing.timed(late, "surgery"):
        wait(1)
        with timing.timed(early, "curves"):
            wait(2)
            with timing.timed(early, "statistics"):
                wait(4)
        wait(8)
        with timing.timed(early, "curves"):
            wait(16)
    with timing.timed(late, "pivots"):
        wait(32)
    assert early == {"curves": 18, "statistics": 4}
    assert late == {"surgery": 9, "pivots": 32}


def test_a_stage_that_breaks_off_counts_as_well(wait):
    early, late = {}, {}
    with timing.timed(late, "trial"):
        wait(1)
        with suppress(ZeroDivisionError), timing.timed(early, "statistics"):
            wait(2)
            raise ZeroDivisionError
        wait(4)
    assert early == {"statistics": 2}
    assert late == {"trial": 5}
