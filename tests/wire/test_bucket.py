"""A bound on bytes a second: never more, and never much less."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.wire.bucket import BURST_SECONDS, Pace, debt, full, taken
from tests.strategies import laws

SIZES = st.lists(st.integers(1, 200_000), min_size=1, max_size=60)
RATES = st.floats(1.0, 1e7)
PAUSES = st.floats(0.0, 100.0)


@laws
@given(RATES, st.lists(st.tuples(st.integers(1, 200_000), PAUSES), min_size=1, max_size=60))
def test_no_stretch_of_time_sees_more_than_its_rate_a_burst_and_one_message(rate, sent) -> None:
    bucket, now, log = full(rate, 0.0), 0.0, []
    for size, pause in sent:
        now += pause + debt(bucket, now + pause)
        bucket = taken(bucket, size, now)
        log.append((now, size))
    largest = max(size for size, _ in sent)
    for first, (start, _) in enumerate(log):
        for last in range(first, len(log)):
            moved = sum(size for _, size in log[first : last + 1])
            assert moved <= (rate * BURST_SECONDS + rate * (log[last][0] - start) + largest) * (1 + 1e-9) + 1e-3


@laws
@given(RATES, SIZES)
def test_whoever_always_has_something_to_send_gets_the_whole_rate(rate, sizes) -> None:
    bucket, now = full(rate, 0.0), 0.0
    for size in sizes:
        now += debt(bucket, now)
        bucket = taken(bucket, size, now)
    assert now <= sum(sizes) / rate * (1 + 1e-9) + 1e-6


@laws
@given(RATES, st.floats(-1e6, 1e6))
def test_a_clock_that_goes_back_gives_nothing(rate, jump) -> None:
    bucket = taken(full(rate, 0.0), 3 * rate, 0.0)
    assert taken(bucket, 0, -abs(jump)).level == bucket.level


def test_without_a_rate_nothing_waits() -> None:
    pace = Pace(None, lambda: 0.0)
    pace.take(10**12)
    assert pace.wait == 0.0
    assert not pace.limited
