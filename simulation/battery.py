"""A battery in virtual time, and the governor that has a device pause: how long a piece of work really takes.

Charge changes evenly between two moments at which something changes: the plug, or a threshold of the governor. So the
time at which work ends is computed from one such moment to the next, and no event of a sleeping device is needed. What
is decided at each moment is `edge_runtime.governor`'s decision.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from edge_runtime import governor
from edge_runtime.governor import Readings, Thresholds
from simulation.traces import FOREVER, HOUR, Trace

FULL = 100.0
_NEAR = 1e-9


@dataclass(frozen=True)
class Cell:
    """What a battery is.

    Attributes:
        capacity_wh: watt-hours when full.
        charge_watts: that the plug gives beside what the device draws.
        load: watts of the device while it works.
        idle: watts while it waits.
    """

    capacity_wh: float
    charge_watts: float
    load: float
    idle: float


@dataclass(frozen=True)
class Charge:
    """What a battery has.

    Attributes:
        percent: its charge.
        at: seconds, when that was so.
        paused: what the governor decided last.
    """

    percent: float
    at: float = 0.0
    paused: governor.State = field(default_factory=governor.State)


@dataclass(frozen=True)
class Outcome:
    """What became of a piece of work.

    Attributes:
        end: seconds, when it was done, or when one looked.
        left: seconds of work that are left then.
        worked: seconds in which the device worked.
        pauses: spans in which the governor had it wait.
        charge: at the end.
    """

    end: float
    left: float
    worked: float
    pauses: tuple[tuple[float, float], ...]
    charge: Charge


def per_second(cell: Cell, watts: float, *, plugged: bool) -> float:
    """Percent a second that the charge changes at that load."""
    flow = cell.charge_watts if plugged else -watts
    return FULL * flow / (cell.capacity_wh * HOUR)


def rested(cell: Cell, charge: Charge, plug: Trace, until: float) -> Charge:
    """The charge after a time of no work.

    Args:
        cell: the battery.
        charge: before.
        plug: when it is on the plug.
        until: seconds.
    """
    percent, now = charge.percent, charge.at
    while now < until:
        step = min(until, plug.next_change(now))
        percent += per_second(cell, cell.idle, plugged=plug.is_on(now)) * (step - now)
        percent, now = min(FULL, max(0.0, percent)), step
    return replace(charge, percent=percent, at=max(now, charge.at))


def work(cell: Cell, charge: Charge, plug: Trace, seconds: float, *, until: float, thresholds: Thresholds) -> Outcome:
    """Work for so many seconds, with the pauses that the governor makes, but look again at `until`.

    Args:
        cell: the battery.
        charge: when it begins.
        plug: when it is on the plug.
        seconds: of work.
        until: at which one looks in any case: the device goes away then, or crashes.
        thresholds: of the governor. A device whose battery is empty waits for the plug, whatever they are.
    """
    now, left, worked, percent, state = charge.at, seconds, 0.0, charge.percent, charge.paused
    pauses: list[tuple[float, float]] = []
    while now < until and left > 0:
        plugged = plug.is_on(now)
        state = governor.step(thresholds, state, Readings(battery_percent=percent, on_battery=not plugged))
        waits = state.paused or (percent <= _NEAR and not plugged)
        slope = per_second(cell, cell.idle if waits else cell.load, plugged=plugged)
        ends = [until, plug.next_change(now), now + _to_threshold(thresholds, percent, slope, plugged=plugged)]
        step = min(ends if waits else [*ends, now + left])
        if step == FOREVER:
            return Outcome(FOREVER, left, worked, (*pauses, (now, FOREVER)), Charge(percent, now, state))
        if waits:
            pauses.append((now, step))
        else:
            worked += step - now
            left = 0.0 if step == now + left else left - (step - now)
        percent, now = min(FULL, max(0.0, percent + slope * (step - now))), step
    return Outcome(now, left, worked, _joined(pauses), Charge(percent, now, state))


def _to_threshold(thresholds: Thresholds, percent: float, slope: float, *, plugged: bool) -> float:
    """Seconds until the charge falls below a level at which something is decided; infinity for never."""
    if plugged or slope >= 0:
        return FOREVER
    levels = [level for level in (thresholds.pause_below_battery, 0.0) if level is not None and level < percent]
    # A hair beyond it, for the governor pauses below a level and not at it.
    return max((percent - max(levels)) / -slope, 0.0) * (1 + 1e-9) + 1e-6 if levels else FOREVER


def _joined(pauses: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    found: list[tuple[float, float]] = []
    for begin, end in pauses:
        if found and found[-1][1] == begin:
            found[-1] = (found[-1][0], end)
        else:
            found.append((begin, end))
    return tuple(found)
