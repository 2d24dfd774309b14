"""Temperature and battery, from trees as Linux shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from profiles import sensors
from profiles.machine import Machine
from profiles.probe import probe, refresh
from tests.profiles.trees import machine, write

ZONE = "sys/class/thermal/thermal_zone{}/"
SUPPLY = "sys/class/power_supply/{}/"


def zones(**degrees: str) -> dict[str, str]:
    """Thermal zones of these types, in thousandths of a degree."""
    found: dict[str, str] = {}
    for index, (name, value) in enumerate(degrees.items()):
        found |= {ZONE.format(index) + "type": name, ZONE.format(index) + "temp": value}
    return found


def supply(name: str, **facts: str) -> dict[str, str]:
    """One power supply."""
    return {SUPPLY.format(name) + key: value for key, value in facts.items()}


def test_the_hottest_sensor_of_the_board_counts(tmp_path: Path) -> None:
    root = write(tmp_path, zones(cpu="41500", gpu="62250", soc="50000"))

    found = sensors.temperature(Machine(root))

    assert found.value == 62.2
    assert "gpu" in found.reason


def test_sensors_that_tell_something_else_do_not_count(tmp_path: Path) -> None:
    """The Jetson's PMIC always says 100 degrees; Wi-Fi cards and disks are warm by themselves."""
    heat = {"PMIC-Die": "100000", "iwlwifi_1": "90000", "nvme": "80000", "cpu": "40000", "off": "-127000", "x": "n/a"}

    assert sensors.temperature(Machine(write(tmp_path, zones(**heat)))).value == 40.0


def test_a_machine_without_sensors_says_so(tmp_path: Path) -> None:
    profile = probe(measure=False, root=machine(tmp_path), disk=tmp_path)

    assert (profile.temperature_celsius, profile.battery_percent, profile.on_battery) == (None, None, False)
    assert "no sensor" in profile.reasons["temperature_celsius"]
    assert "no battery" in profile.reasons["on_battery"]


@pytest.mark.parametrize(
    ("status", "online", "expected"),
    [("Discharging", "0", True), ("Charging", "1", False), ("Full", "1", False), ("Discharging", "1", False)],
)
def test_a_battery_feeds_the_machine_when_it_drains_and_nothing_is_plugged_in(
    tmp_path: Path, status: str, online: str, expected: bool
) -> None:
    files = supply("BAT0", type="Battery", capacity="55", status=status) | supply("AC", type="Mains", online=online)

    profile = probe(measure=False, root=write(machine(tmp_path), files), disk=tmp_path)

    assert (profile.battery_percent, profile.on_battery) == (55.0, expected)


def test_a_mouse_has_a_battery_and_does_not_count(tmp_path: Path) -> None:
    files = supply("hidpp", type="Battery", scope="Device", capacity="5", status="Discharging")

    assert sensors.battery(Machine(write(tmp_path, files))) is None


def test_two_batteries_are_taken_together(tmp_path: Path) -> None:
    files = supply("BAT0", type="Battery", capacity="100", status="Full") | supply(
        "BAT1", type="Battery", capacity="20", status="Discharging"
    )

    found = sensors.battery(Machine(write(tmp_path, files)))

    assert found is not None
    assert (found.percent, found.discharging) == (60.0, True)


def test_refreshing_reads_the_sensors_again(tmp_path: Path) -> None:
    root = write(machine(tmp_path), zones(cpu="40000") | supply("BAT0", type="Battery", capacity="90", status="Full"))
    before = probe(measure=False, root=root, disk=tmp_path)

    write(root, zones(cpu="85000") | supply("BAT0", capacity="15", status="Discharging"))
    after = refresh(before, root=root, disk=tmp_path)

    assert (before.temperature_celsius, before.battery_percent, before.on_battery) == (40.0, 90.0, False)
    assert (after.temperature_celsius, after.battery_percent, after.on_battery) == (85.0, 15.0, True)
