"""Temperature and battery, from /sys or by way of psutil. Also what a governor asks while a device trains.

Source: Linux kernel documentation, driver-api/thermal/sysfs-api.rst (`temp` in thousandths of a degree) and
ABI/testing/sysfs-class-power.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from profiles.machine import Machine, Reading

# Sensors of parts that training does not heat, and the Jetson's PMIC, which always says 100 degrees.
ELSEWHERE = ("pmic", "iwlwifi", "nvme", "ath", "mt7", "bat", "drivetemp", "jc42", "r8169")
# Colder or hotter than any board runs: a sensor that is switched off, or none at all.
PLAUSIBLE = (-40.0, 150.0)


@dataclass(frozen=True)
class Battery:
    """The battery, or all batteries taken together.

    Attributes:
        percent: of its charge, 0 to 100.
        discharging: True when nothing charges it.
        source: where that was read.
    """

    percent: float
    discharging: bool
    source: str


def temperature(machine: Machine) -> Reading:
    """The hottest sensor of processor and board, in degrees Celsius; None where there is none."""
    found = [*_zones(machine), *(_by_psutil() if machine.root == Path("/") else ())]
    heard = [(degrees, name) for name, degrees in found if PLAUSIBLE[0] < degrees < PLAUSIBLE[1]]
    if not heard:
        said = f"{len(found)} sensors, none of them plausible" if found else "no sensor of processor or board"
        return Reading(None, f"{said} in /sys/class/thermal, nor by psutil")
    degrees, name = max(heard)
    return Reading(round(degrees, 1), f"the hottest of {len(heard)} sensors: {name}")


def battery_percent(machine: Machine) -> Reading:
    """Charge of the battery, in percent; None where there is none."""
    found = battery(machine)
    return Reading(None, _NO_BATTERY) if found is None else Reading(round(found.percent, 1), found.source)


def on_battery(machine: Machine) -> Reading:
    """Whether a battery is what feeds this machine."""
    found = battery(machine)
    if found is None:
        return Reading(False, _NO_BATTERY)
    return Reading(
        found.discharging, f"the battery is {'' if found.discharging else 'not '}discharging; {found.source}"
    )


def battery(machine: Machine) -> Battery | None:
    """The machine's own battery, or None when it has none; those of mice and headphones do not count.

    Raises:
        ValueError: a battery whose charge is no number.
    """
    supplies = sorted((machine.root / "sys/class/power_supply").glob("*"))
    own = [supply for supply in supplies if _text(supply / "type") == "Battery" and _text(supply / "scope") != "Device"]
    charges = [float(text) for supply in own if (text := _text(supply / "capacity"))]
    if charges:
        plugged = any(_text(supply / "online") == "1" for supply in supplies)
        draining = any(_text(supply / "status") == "Discharging" for supply in own)
        return Battery(_mean(charges), draining and not plugged, "from /sys/class/power_supply")
    # psutil has no such function where it knows no way to ask, and answers None without a battery.
    ask = getattr(psutil, "sensors_battery", None)
    state = ask() if ask is not None and machine.root == Path("/") else None
    return (
        None if state is None else Battery(float(state.percent), state.power_plugged is False, "as psutil reports it")
    )


_NO_BATTERY = "no battery in /sys/class/power_supply, nor by psutil"


def _zones(machine: Machine) -> Iterator[tuple[str, float]]:
    """(name, degrees) of each thermal zone that answers; a zone may refuse while its part is switched off."""
    for zone in sorted((machine.root / "sys/class/thermal").glob("thermal_zone*")):
        name, degrees = _text(zone / "type") or zone.name, _number(zone / "temp")
        if degrees is not None and not name.lower().startswith(ELSEWHERE):
            yield name, degrees / 1000


def _by_psutil() -> Iterator[tuple[str, float]]:
    ask = getattr(psutil, "sensors_temperatures", None)
    for name, entries in (ask() if ask is not None else {}).items():
        if not name.lower().startswith(ELSEWHERE):
            for entry in entries:
                yield f"{name} {entry.label}".strip(), float(entry.current)


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known)


def _number(path: Path) -> float | None:
    try:
        return float(_text(path) or "")
    except (OSError, ValueError):
        return None


def _text(path: Path) -> str:
    """The file's text without its end of line; empty when there is none."""
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
