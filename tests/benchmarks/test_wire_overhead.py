"""The count of the protocol's own bytes: by the specification, and over a whole round."""

from __future__ import annotations

import pytest

from benchmarks.wire_overhead import framing, measure


@pytest.mark.parametrize(
    ("topic", "size", "bytes_added"),
    [
        # Header 1, length 1, topic 2 + 3, identifier 2; PUBACK 4.
        ("a/b", 10, 13),
        # 7 + 120 is the last length of one digit.
        ("a/b", 120, 13),
        ("a/b", 121, 14),
        ("a/b", 16_376, 14),
        ("a/b", 16_377, 15),
    ],
)
def test_framing_is_what_mqtt_adds(topic: str, size: int, bytes_added: int) -> None:
    assert framing(topic, size) == bytes_added


@pytest.mark.slow
def test_a_round_is_counted_with_all_that_is_said() -> None:
    found = measure()

    assert found["payload_bytes"] > 900_000
    assert found["control_bytes"] > 5_000, "hello, offer and the reports of 24 steps at least"
    assert found["messages"] > 40
