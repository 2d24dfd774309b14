"""Whether a device may train now: thresholds, readings and the state before → the state after. Pure.

Two thresholds for each cause keep it from flapping: a battery that made training pause must rise above a second, higher
level before training goes on, and a temperature must fall below a second, lower one. A sensor that is missing, or has
gone, never makes a device pause: most boards have no battery, and some no thermometer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from edge_runtime.errors import ConfigError

GO = "go"


@dataclass(frozen=True)
class Thresholds:
    """When to pause and when to go on; None switches a cause off. See `edge_runtime.config.Governor`.

    Raises:
        ConfigError: a device would go on before it may pause.

    Attributes:
        pause_below_battery: percent, on battery alone.
        resume_above_battery: percent; at least the one above.
        pause_above_temperature: degrees Celsius, of the hottest sensor.
        resume_below_temperature: degrees Celsius; at most the one above.
        pause_on_user_activity: whether a person at the device comes first.
    """

    pause_below_battery: float | None = None
    resume_above_battery: float | None = None
    pause_above_temperature: float | None = None
    resume_below_temperature: float | None = None
    pause_on_user_activity: bool = False

    def __post_init__(self) -> None:
        low, high = self.pause_below_battery, self.resume_above_battery
        if low is not None and high is not None and high < low:
            raise ConfigError(
                f"governor.resume_above_battery: expected at least pause_below_battery, {low:g} %; found {high:g} %"
            )
        high, low = self.pause_above_temperature, self.resume_below_temperature
        if low is not None and high is not None and high < low:
            raise ConfigError(
                f"governor.resume_below_temperature: expected at most pause_above_temperature, {high:g} °C; "
                f"found {low:g} °C"
            )

    @property
    def any(self) -> bool:
        """Whether there is anything to look at."""
        found = (self.pause_below_battery, self.pause_above_temperature)
        return self.pause_on_user_activity or any(level is not None for level in found)


@dataclass(frozen=True)
class Readings:
    """What the sensors say; None is a sensor that is missing.

    Attributes:
        battery_percent: its charge.
        on_battery: whether nothing charges it.
        temperature_celsius: of the hottest sensor that matters.
        user_active: a sentence on what a person does; empty for nothing.
    """

    battery_percent: float | None = None
    on_battery: bool = False
    temperature_celsius: float | None = None
    user_active: str | None = None


@dataclass(frozen=True)
class State:
    """What the governor has decided.

    Attributes:
        causes: why training pauses, cause → sentence; empty when it may go on.
    """

    causes: tuple[tuple[str, str], ...] = ()

    @property
    def paused(self) -> bool:
        """Whether training waits."""
        return bool(self.causes)

    @property
    def reason(self) -> str:
        """Why, in words; "go" when it does not."""
        return "; ".join(sentence for _, sentence in self.causes) or GO


def step(thresholds: Thresholds, state: State, readings: Readings) -> State:
    """The decision after new readings."""
    before = {cause for cause, _ in state.causes}
    judged = ((cause, judge(thresholds, readings, paused=cause in before)) for cause, judge in CAUSES.items())
    return State(tuple((cause, sentence) for cause, sentence in judged if sentence))


def _battery(thresholds: Thresholds, readings: Readings, *, paused: bool) -> str:
    low, charge = thresholds.pause_below_battery, readings.battery_percent
    if low is None or charge is None or not readings.on_battery:
        return ""
    high = low if thresholds.resume_above_battery is None else thresholds.resume_above_battery
    if charge < (high if paused else low):
        return f"the battery is at {charge:.0f} %; training pauses below {low:g} % and goes on from {high:g} %"
    return ""


def _temperature(thresholds: Thresholds, readings: Readings, *, paused: bool) -> str:
    high, heat = thresholds.pause_above_temperature, readings.temperature_celsius
    if high is None or heat is None:
        return ""
    low = high if thresholds.resume_below_temperature is None else thresholds.resume_below_temperature
    if heat > (low if paused else high):
        return f"the device is at {heat:.0f} °C; training pauses above {high:g} °C and goes on at {low:g} °C"
    return ""


def _user(thresholds: Thresholds, readings: Readings, *, paused: bool) -> str:
    # The reading itself looks back over minutes, so that it does not flap: see `edge_runtime.sensors`.
    del paused
    return (readings.user_active or "") if thresholds.pause_on_user_activity else ""


CAUSES: Mapping[str, Callable[..., str]] = {"battery": _battery, "temperature": _temperature, "user": _user}
"""Cause → why it makes training pause now; empty when it does not."""
