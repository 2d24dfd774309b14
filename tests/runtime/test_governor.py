"""When a device pauses and when it goes on: hysteresis, and sensors that are missing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import ConfigError
from edge_runtime.governor import GO, Readings, State, Thresholds, step

LEVELS = Thresholds(30.0, 40.0, 85.0, 80.0, pause_on_user_activity=True)
ON_BATTERY = Readings(battery_percent=50.0, on_battery=True, temperature_celsius=50.0, user_active="")
percents = st.floats(0, 100)


def after(*readings: Readings, thresholds: Thresholds = LEVELS) -> State:
    state = State()
    for reading in readings:
        state = step(thresholds, state, reading)
    return state


@pytest.mark.parametrize(
    ("charges", "paused"),
    [([31], False), ([30], False), ([29.9], True), ([29, 39.9], True), ([29, 40], False), ([29, 40, 35], False)],
)
def test_a_battery_pauses_below_one_level_and_goes_on_from_another(charges: list[float], paused: bool) -> None:
    assert after(*(replace(ON_BATTERY, battery_percent=charge) for charge in charges)).paused is paused


@pytest.mark.parametrize(
    ("heat", "paused"),
    [([85], False), ([85.1], True), ([86, 80.1], True), ([86, 80], False), ([86, 80, 84], False)],
)
def test_heat_pauses_above_one_level_and_goes_on_from_another(heat: list[float], paused: bool) -> None:
    assert after(*(Readings(temperature_celsius=degrees) for degrees in heat)).paused is paused


def test_a_charger_ends_the_pause_at_once() -> None:
    low = replace(ON_BATTERY, battery_percent=5.0)

    assert after(low).paused
    assert not after(low, replace(low, on_battery=False)).paused


def test_a_person_comes_first_only_where_that_is_asked_for() -> None:
    busy = Readings(user_active="somebody typed 3 s ago")

    assert after(busy).reason == "somebody typed 3 s ago"
    assert not after(busy, thresholds=replace(LEVELS, pause_on_user_activity=False)).paused


def test_several_causes_are_all_named_and_all_must_end() -> None:
    both = replace(ON_BATTERY, battery_percent=10.0, temperature_celsius=90.0)
    state = after(both)

    assert [cause for cause, _ in state.causes] == ["battery", "temperature"]
    assert "10 %" in state.reason
    assert "90 °C" in state.reason
    assert after(both, replace(both, temperature_celsius=60.0)).paused
    assert after(both, replace(both, temperature_celsius=60.0, battery_percent=90.0)).reason == GO


@given(st.lists(st.floats(30, 40, exclude_max=True), min_size=1), st.booleans())
def test_between_the_two_levels_nothing_ever_changes(charges: list[float], paused: bool) -> None:
    """So a charge that wavers there makes no device flap."""
    state = after(replace(ON_BATTERY, battery_percent=10.0)) if paused else State()
    for charge in charges:
        state = step(LEVELS, state, replace(ON_BATTERY, battery_percent=charge))
        assert state.paused is paused


@given(st.lists(st.floats(80, 85, exclude_min=True), min_size=1), st.booleans())
def test_between_the_two_temperatures_nothing_ever_changes(heat: list[float], paused: bool) -> None:
    state = after(Readings(temperature_celsius=99.0)) if paused else State()
    for degrees in heat:
        state = step(LEVELS, state, Readings(temperature_celsius=degrees))
        assert state.paused is paused


@given(st.lists(st.builds(Readings, percents, st.booleans(), st.floats(-20, 140), st.sampled_from(["", "busy"]))))
def test_sensors_that_are_missing_never_pause_whatever_was_before(readings: list[Readings]) -> None:
    assert not after(*readings, Readings()).paused


@given(st.lists(st.builds(Readings, percents, st.booleans(), st.floats(-20, 140), st.sampled_from(["", "busy"]))))
def test_what_is_switched_off_never_pauses(readings: list[Readings]) -> None:
    assert not Thresholds().any
    assert not after(*readings, thresholds=Thresholds()).paused


@given(percents, percents)
def test_levels_that_contradict_each_other_are_refused(one: float, other: float) -> None:
    low, high = sorted((one, other))
    Thresholds(low, high, high, low)
    if low < high:
        with pytest.raises(ConfigError, match="resume_above_battery"):
            Thresholds(pause_below_battery=high, resume_above_battery=low)
        with pytest.raises(ConfigError, match="resume_below_temperature"):
            Thresholds(pause_above_temperature=low, resume_below_temperature=high)
