"""Transfers in virtual time: a device's link, and the bottleneck that it shares with others of its site.

A transfer alone takes latency/2 + bytes/rate. TCP does not fill a link that loses packets: its rate is then at most

    MSS · sqrt(3/2) / (RTT · sqrt(p))

(Mathis, Semke, Mahdavi, Ott: "The macroscopic behavior of the TCP congestion avoidance algorithm", CCR 27(3), 1997),
and of what is sent, the share p is sent again. Transfers through one bottleneck share it by max-min fairness: each has
an equal part, and what one cannot use, because its own link is slower, is shared among the others.

What was on its way when a transfer is stopped is kept in whole chunks, as both ends keep it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from simulation.clock import Clock, Event

MSS_BITS = 8 * 1460
"""Of a TCP segment in an Ethernet frame."""
LEAST_RTT = 1e-3
"""Seconds that a round trip is taken to last at least, where TCP's rate depends on it."""
BITS = 8.0
MEGA = 1e6


@dataclass(frozen=True)
class Quality:
    """One direction of a link.

    Attributes:
        rate: bits a second of a transfer that has it alone.
        latency: seconds of a message on its way.
    """

    rate: float
    latency: float


def quality(mbit_s: float, latency_ms: float, loss: float) -> Quality:
    """A link's direction.

    Args:
        mbit_s: its rate without losses.
        latency_ms: of a small message there and back, milliseconds.
        loss: share of the packets that are lost.
    """
    rate = MEGA * mbit_s
    if loss:
        round_trip = max(LEAST_RTT, latency_ms / 1000.0)
        rate = min(rate, MSS_BITS * math.sqrt(1.5) / (round_trip * math.sqrt(loss))) * (1.0 - loss)
    return Quality(rate, latency_ms / 2000.0)


class Transfer:
    """Bytes on their way; made by `send`.

    Attributes:
        size: bytes in all.
        chunk: bytes that are kept together.
    """

    def __init__(self, clock: Clock, size: float, chunk: float, arrived: Callable[[], None]) -> None:
        self.size, self.chunk, self._left = size, chunk, BITS * size
        self._clock, self._arrived = clock, arrived
        self._event: Event | None = None
        self._rate, self._since, self._latency = 0.0, clock.now, 0.0
        self._way: Bottleneck | None = None
        self.over = False

    @property
    def kept(self) -> float:
        """Bytes in chunks that are whole at the other end."""
        done = self.size - self._rest() / BITS
        return min(self.size, self.chunk * math.floor(done / self.chunk + 1e-9)) if not self.over else self.size

    def stop(self) -> float:
        """End it here; the bytes that are kept."""
        kept = self.kept
        self._end()
        return kept

    def begin(self, own: Quality, way: Bottleneck | None) -> None:
        """Set off, over a link and, where there is one, through a bottleneck."""
        self._latency, self._way = own.latency, way
        if way is None:
            self.at_rate(own.rate)
        else:
            way.enter(self, own.rate)

    def at_rate(self, rate: float) -> None:
        """From now on it moves at so many bits a second."""
        self._left, self._since, self._rate = self._rest(), self._clock.now, rate
        if self._event is not None:
            self._event.cancel()
        self._event = self._clock.after(self._left / rate, self._sent)

    def _rest(self) -> float:
        return max(0.0, self._left - self._rate * (self._clock.now - self._since))

    def _sent(self) -> None:
        self._left = 0.0
        self._end()
        # The last bit leaves now, and is there after the latency.
        self._event = self._clock.after(self._latency, self._arrived)

    def _end(self) -> None:
        self.over = True
        if self._event is not None:
            self._event.cancel()
        if self._way is not None:
            self._way.leave(self)
            self._way = None


class Bottleneck:
    """What the devices of a site share, in one direction.

    Args:
        rate: bits a second.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._inside: dict[Transfer, float] = {}

    def enter(self, transfer: Transfer, own: float) -> None:
        """A transfer whose own link has that rate begins."""
        self._inside[transfer] = own
        self._share()

    def leave(self, transfer: Transfer) -> None:
        """A transfer ended."""
        if self._inside.pop(transfer, None) is not None:
            self._share()

    def _share(self) -> None:
        for transfer, rate in zip(self._inside, shares(self._rate, list(self._inside.values())), strict=True):
            transfer.at_rate(rate)


def shares(whole: float, most: list[float]) -> list[float]:
    """How a rate is shared by max-min fairness among those that can use up to so much each."""
    found, left, waiting = [0.0] * len(most), whole, sorted(range(len(most)), key=most.__getitem__)
    for position, index in enumerate(waiting):
        found[index] = min(most[index], left / (len(waiting) - position))
        left -= found[index]
    return found


def send(
    clock: Clock,
    size: float,
    own: Quality,
    arrived: Callable[[], None],
    *,
    way: Bottleneck | None = None,
    chunk: float = math.inf,
) -> Transfer:
    """Begin a transfer.

    Args:
        clock: of the simulation.
        size: bytes.
        own: of the device's link, in that direction.
        arrived: told when the last byte is there.
        way: a bottleneck that it goes through.
        chunk: bytes that are kept together, if it is stopped.
    """
    transfer = Transfer(clock, size, min(chunk, max(size, 1.0)), arrived)
    transfer.begin(own, way)
    return transfer
