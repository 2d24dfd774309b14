from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulation.clock import Clock

DELAYS = st.lists(st.floats(0, 1e6), max_size=30)


@given(DELAYS)
def test_events_happen_in_the_order_of_time_and_of_one_instant_in_that_of_scheduling(delays: list[float]) -> None:
    clock, happened = Clock(), []

    def note(number: int) -> None:
        happened.append((clock.now, number))

    for number, delay in enumerate(delays):
        clock.after(delay, partial(note, number))
    while clock.step():
        pass
    assert happened == sorted((delay, number) for number, delay in enumerate(delays))


@given(DELAYS)
def test_no_event_comes_before_its_cause(delays: list[float]) -> None:
    """Each event schedules the next one; time never runs backwards."""
    clock, causes = Clock(), []

    def happen(left: list[float], cause: float) -> None:
        causes.append((cause, clock.now))
        if left:
            clock.after(left[0], lambda: happen(left[1:], clock.now))

    clock.after(0.0, lambda: happen(delays, 0.0))
    before = 0.0
    while clock.step():
        assert clock.now >= before
        before = clock.now
    assert all(cause <= effect for cause, effect in causes)
    assert before == pytest.approx(sum(delays))


@pytest.mark.parametrize("when", [-1.0, float("nan"), float("inf")])
def test_nothing_is_scheduled_in_the_past_or_at_no_time(when: float) -> None:
    with pytest.raises(ValueError, match="an event comes at"):
        Clock().at(when, lambda: None)


def test_what_is_cancelled_does_not_happen_and_is_not_waited_for() -> None:
    clock, happened = Clock(), []
    event = clock.after(1.0, lambda: happened.append(1))
    assert clock.pending()
    assert not clock.pending(event)
    event.cancel()
    assert not clock.pending()
    assert not clock.step()
    assert happened == []
