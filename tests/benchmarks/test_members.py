"""The benchmark of large fleets measures rounds that really go on."""

from __future__ import annotations

from benchmarks.members import UPDATES, measure


def test_a_fleet_is_measured_over_as_many_updates_as_it_takes() -> None:
    found = measure(300)
    assert found["asked"] == 15, "one in twenty"
    assert all(value > 0 for value in found.values())
    assert found["asked"] < UPDATES, "several rounds"
