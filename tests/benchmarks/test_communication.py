"""What a round moves is counted from real payloads."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")

from benchmarks.communication import DEVICES, Traffic, exponent, payload
from server.aggregators.page import REFERENCE

SMALL = dict(list(REFERENCE.items())[:2])


def test_a_payload_grows_with_rank_and_one_factor_is_less_than_both() -> None:
    both, first, second = (payload(SMALL, 4, factor) for factor in ("ab", "a", "b"))
    assert 0.9 * both < first + second < 1.1 * both
    assert 1.8 * both < payload(SMALL, 8, "ab") < 2.2 * both


def test_the_exponent_is_the_slope() -> None:
    square = {count: Traffic(0.0, 3.0 * count**2, 1.0) for count in DEVICES}
    assert exponent(square) == pytest.approx(2.0)
