"""The profile as a value."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from edge_runtime.errors import ConfigError
from profiles.catalogue import device
from profiles.device import DeviceProfile, rows, shown


def test_a_field_without_a_reason_is_refused() -> None:
    profile = device("raspberry-pi-5")
    reasons = {field: reason for field, reason in profile.reasons.items() if field != "four_bit"}

    with pytest.raises(ConfigError, match="four_bit"):
        replace(profile, reasons=reasons)


def test_an_unknown_kind_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="apple, cpu, cuda"):
        replace(device("raspberry-pi-5"), kind="tpu")


@pytest.mark.parametrize("change", [{"surprise": 1}, {"four_bit": None}])
def test_json_with_other_keys_is_refused_by_name(change: dict[str, Any]) -> None:
    data = device("raspberry-pi-5").to_json()
    for key, value in change.items():
        if value is None:
            del data[key]
        else:
            data[key] = value

    with pytest.raises(ConfigError, match=next(iter(change))):
        DeviceProfile.from_json(data)


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (3 * 2**20, "bytes", "3 MiB"),
        (None, "bytes", "none"),
        ((), "", "none"),
        (True, "", "yes"),
        (4, "cores", "4 cores"),
        (1.5, "GFLOP/s", "1.50 GFLOP/s"),
        (("avx2", "sve"), "", "avx2, sve"),
    ],
)
def test_values_are_shown_with_their_unit(value: object, unit: str, expected: str) -> None:
    assert shown(value, unit) == expected


def test_a_row_of_an_unreadable_field_shows_the_cause() -> None:
    by_field = {row.field: row for row in rows(device("raspberry-pi-5"))}

    assert by_field["gemm bf16"].value == "unreadable"
    assert by_field["gemm bf16"].reason == "no published figure"


@pytest.mark.parametrize(
    ("name", "pool"), [("raspberry-pi-5", "host"), ("jetson-orin-nano", "shared"), ("desktop-gpu", "gpu")]
)
def test_the_pool_is_the_memory_that_training_fills(name: str, pool: str) -> None:
    assert device(name).pool == pool
