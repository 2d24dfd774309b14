"""A bound on bytes a second, as a token bucket. Pure: time is an argument.

A bucket fills at `rate` up to `burst`. Whoever sends takes as many tokens as there are bytes, at once, also below zero,
and waits until the debt is paid before sending more: a message larger than the bucket passes, and costs its time. In
any stretch of t seconds, no more than burst + rate * t + one message passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

BURST_SECONDS = 1.0
"""What a bucket holds, in seconds of its rate: a device that was silent may send this much at once."""


@dataclass(frozen=True)
class Rates:
    """What a device may move, bytes a second on average; None for no limit.

    Attributes:
        up: to the broker.
        down: from the broker.
    """

    up: float | None = None
    down: float | None = None


@dataclass(frozen=True)
class Bucket:
    """A bucket at a moment.

    Attributes:
        rate: tokens a second.
        burst: what it holds at most.
        level: what was in it then; below zero for a debt.
        at: that moment, seconds from any origin.
    """

    rate: float
    burst: float
    level: float
    at: float


def full(rate: float, now: float) -> Bucket:
    """A full bucket."""
    burst = rate * BURST_SECONDS
    return Bucket(rate, burst, burst, now)


def taken(bucket: Bucket, tokens: float, now: float) -> Bucket:
    """The bucket after so many tokens are taken. A clock that went back fills nothing."""
    gained = max(0.0, now - bucket.at) * bucket.rate
    return replace(bucket, level=min(bucket.burst, bucket.level + gained) - tokens, at=max(now, bucket.at))


def debt(bucket: Bucket, now: float) -> float:
    """Seconds until the bucket is not below zero any more."""
    return max(0.0, -taken(bucket, 0, now).level / bucket.rate)


class Pace:
    """A bucket with a clock; without a rate, it lets all pass. For one thread at a time."""

    def __init__(self, rate: float | None, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._bucket = full(rate, clock()) if rate else None

    @property
    def limited(self) -> bool:
        """Whether there is a limit at all."""
        return self._bucket is not None

    def take(self, size: int) -> None:
        """So many bytes have passed, or are about to."""
        if self._bucket is not None:
            self._bucket = taken(self._bucket, size, self._clock())

    @property
    def wait(self) -> float:
        """Seconds until the next byte may pass."""
        return debt(self._bucket, self._clock()) if self._bucket is not None else 0.0
