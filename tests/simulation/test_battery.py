from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.governor import Thresholds
from simulation.battery import Cell, Charge, rested, work
from simulation.traces import FOREVER, HOUR, Trace

CELL = Cell(capacity_wh=10.0, charge_watts=10.0, load=10.0, idle=1.0)
NONE, CAREFUL = Thresholds(), Thresholds(pause_below_battery=30.0, resume_above_battery=40.0)


def never() -> Trace:
    return Trace([])


def test_a_battery_gives_its_watt_hours_and_no_more() -> None:
    """10 Wh at 10 W: one hour; then the device waits for a plug that never comes."""
    found = work(CELL, Charge(100.0), never(), 2 * HOUR, until=FOREVER, thresholds=NONE)
    assert found.end == FOREVER
    assert found.worked == pytest.approx(HOUR, abs=1)
    assert found.left == pytest.approx(HOUR, abs=1)


def test_the_governor_pauses_and_the_plug_lets_it_go_on() -> None:
    """From 100 to 30 % in 0.7 h; plugged from 2 h on: 0.3 h are left."""
    plug = Trace([(2 * HOUR, FOREVER)])
    found = work(CELL, Charge(100.0), plug, HOUR, until=FOREVER, thresholds=CAREFUL)
    assert found.end == pytest.approx(2.3 * HOUR, abs=1)
    assert found.worked == pytest.approx(HOUR)
    ((begin, end),) = found.pauses
    assert begin == pytest.approx(0.7 * HOUR, abs=1)
    assert end == 2 * HOUR


@given(st.floats(0, 100), st.floats(0.1, 5), st.floats(0.1, 3), st.floats(0, 8))
def test_looking_in_between_changes_nothing(percent: float, hours: float, period: float, look: float) -> None:
    """Work in two stretches ends when it would have ended in one, with the same charge."""

    def plug() -> Trace:
        return Trace((HOUR * period * (2 * n + 1), HOUR * period * (2 * n + 2)) for n in range(200))

    whole = work(CELL, Charge(percent), plug(), HOUR * hours, until=FOREVER, thresholds=CAREFUL)
    first = work(CELL, Charge(percent), plug(), HOUR * hours, until=HOUR * look, thresholds=CAREFUL)
    second = work(CELL, first.charge, plug(), first.left, until=FOREVER, thresholds=CAREFUL)
    end = second.end if first.left > 0 else first.end
    assert end == pytest.approx(whole.end, abs=0.1)
    assert first.worked + (second.worked if first.left > 0 else 0) == pytest.approx(HOUR * hours, abs=0.1)
    assert 0 <= whole.charge.percent <= 100
    assert first.end <= HOUR * look


def test_a_resting_device_discharges_and_charges() -> None:
    assert rested(CELL, Charge(50.0), never(), HOUR).percent == pytest.approx(40.0)
    assert rested(CELL, Charge(50.0), Trace([(0, FOREVER)]), HOUR).percent == 100.0
