from __future__ import annotations

import math
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulation.clock import Clock
from simulation.links import Bottleneck, Quality, quality, send, shares

SIZES, RATES = st.floats(1, 1e9), st.floats(1e3, 1e9)


def seconds(size: float, own: Quality, way: Bottleneck | None = None) -> float:
    """What a transfer alone takes."""
    clock, arrived = Clock(), []
    send(clock, size, own, lambda: arrived.append(clock.now), way=way)
    while clock.step():
        pass
    (found,) = arrived
    return float(found)


@given(SIZES, RATES, st.floats(0, 10))
def test_a_link_of_half_the_rate_takes_twice_as_long(size: float, rate: float, latency: float) -> None:
    fast, slow = (seconds(size, Quality(found, latency)) for found in (rate, rate / 2))
    assert slow - latency == pytest.approx(2 * (fast - latency), rel=1e-6, abs=1e-9)
    assert fast == pytest.approx(latency + 8 * size / rate)


def test_a_lossy_link_is_slower_by_the_published_bound() -> None:
    """1 % on 100 ms: 1460 bytes · sqrt(1.5) / (0.1 s · 0.1), of which 99 % arrive."""
    found = quality(1000.0, 100.0, 0.01)
    assert found.rate == pytest.approx(8 * 1460 * math.sqrt(1.5) / 0.01 * 0.99)
    assert quality(0.1, 100.0, 0.01).rate == pytest.approx(1e5 * 0.99)
    assert quality(5.0, 100.0, 0.0) == Quality(5e6, 0.05)


@given(RATES, st.lists(RATES, min_size=1, max_size=12))
def test_a_bottleneck_is_shared_by_max_min_fairness(whole: float, most: list[float]) -> None:
    found = shares(whole, most)
    assert sum(found) == pytest.approx(min(whole, sum(most)))
    assert all(0 <= share <= own * (1 + 1e-9) for share, own in zip(found, most, strict=True))
    limited = [share for share, own in zip(found, most, strict=True) if share < own * (1 - 1e-9)]
    # Nobody that could use more has less than anybody else.
    assert all(share >= max(found) * (1 - 1e-6) for share in limited)


def test_two_transfers_share_a_bottleneck_and_the_longer_one_has_it_alone_afterwards() -> None:
    clock, way = Clock(), Bottleneck(8e6)
    arrived: dict[str, float] = {}

    def note(name: str) -> None:
        arrived[name] = clock.now

    for name, size in (("short", 1e6), ("long", 3e6)):
        send(clock, size, Quality(1e9, 0.0), partial(note, name), way=way)
    while clock.step():
        pass
    assert arrived == {"short": pytest.approx(2.0), "long": pytest.approx(4.0)}


@given(SIZES, RATES, st.floats(1, 1e6), st.floats(0, 1))
def test_what_is_stopped_keeps_whole_chunks_and_the_rest_takes_the_rest_of_the_time(
    size: float, rate: float, chunk: float, share: float
) -> None:
    clock = Clock()
    transfer = send(clock, size, Quality(rate, 0.0), lambda: None, chunk=chunk)
    clock.at(share * 8 * size / rate, lambda: None)
    clock.step()
    kept = transfer.stop()
    whole = min(chunk, max(size, 1.0))
    assert kept == size or kept / whole == pytest.approx(round(kept / whole))
    assert kept <= share * size * (1 + 1e-6) + 1e-6 or kept == size
    assert kept >= min(share, 1.0) * size - whole * (1 + 1e-6)
