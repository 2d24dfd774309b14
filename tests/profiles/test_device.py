"""The profile as a value."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from edge_runtime.errors import ConfigError
from profiles.catalogue import device
from profiles.device import DeviceProfile, rows, shown, with_link
from profiles.probe import probe


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
        (0.01234, "GB/s", "0.0123 GB/s"),
        (129400.0, "GFLOP/s", "129,400 GFLOP/s"),
        (47.24, "GFLOP/s", "47.2 GFLOP/s"),
        (-3.25, "°C", "-3.25 °C"),
        (0.0, "W", "0 W"),
        ("", "", "none"),
        (((128, 576, 192), (1, 2, 3)), "tokens x inputs x outputs", "128 x 576 x 192, 1 x 2 x 3"),
        (("avx2", "sve"), "", "avx2, sve"),
    ],
)
def test_values_are_shown_with_their_unit(value: object, unit: str, expected: str) -> None:
    assert shown(value, unit) == expected


def test_a_row_of_an_unreadable_field_shows_the_cause() -> None:
    by_field = {row.field: row for row in rows(device("raspberry-pi-5"))}

    assert by_field["gemm bf16"].value == "unreadable"
    assert by_field["gemm bf16"].reason == "no published figure"


def test_a_title_leaves_out_the_unit_that_stands_beside_the_value() -> None:
    titles = [row.field for row in rows(device("raspberry-pi-5"))]

    assert {"memory total", "memory bandwidth", "nf4", "op overhead", "temperature", "link up", "power"} <= set(titles)
    assert len(set(titles)) == len(titles)


def test_a_test_of_the_link_replaces_what_was_unknown() -> None:
    before = probe(measure=False)

    after = with_link(before, up_mbit_s=9.5, down_mbit_s=48.0, latency_ms=12.0, reason="measured")

    assert (after.link_up_mbit_s, after.link_down_mbit_s, after.link_latency_ms) == (9.5, 48.0, 12.0)
    assert after.reasons["link_latency_ms"] == "measured"
    assert set(before.unreadable) - set(after.unreadable) == {"link_up_mbit_s", "link_down_mbit_s", "link_latency_ms"}
    assert DeviceProfile.from_json(after.to_json()) == after


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("physical_cores", 1.5),
        ("memory_total_bytes", -1),
        ("gemm_fp32_gflops", float("nan")),
        ("gemm_shapes", [[1, 2]]),
        ("gemm_shapes", [[1, 2, 0]]),
        ("instruction_sets", "avx2"),
        ("gpus", [{"name": "x"}]),
        ("four_bit", 1),
        ("board", None),
        ("temperature_celsius", "hot"),
        ("reasons", {"name": 3}),
    ],
)
def test_json_with_a_value_that_cannot_be_is_refused_by_name(field: str, value: object) -> None:
    data = {**device("raspberry-pi-5").to_json(), field: value}

    with pytest.raises(ConfigError, match="GPU" if field == "gpus" else f"'{field}'") as refusal:
        DeviceProfile.from_json(data)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "pool"), [("raspberry-pi-5", "host"), ("jetson-orin-nano", "shared"), ("desktop-gpu", "gpu")]
)
def test_the_pool_is_the_memory_that_training_fills(name: str, pool: str) -> None:
    assert device(name).pool == pool
