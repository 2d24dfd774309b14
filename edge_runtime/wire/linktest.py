"""How fast the link to the broker is, each way, and how long a small message takes there and back.

Everything goes through the broker that the fleet uses, on topics of the device's own that nobody else listens to:

- latency: a message of a few bytes is published and comes back to the device that published it; the median of five;
- up: retained messages are published and the clock stops when the broker has acknowledged the last;
- down: the device subscribes to them, so the broker sends them all; the clock stops when the last has arrived.

The two directions thus never share the line. The amount grows fourfold until it takes long enough to be timed or
reaches `size`, so a slow link is measured with little and a fast one with much. What was retained is cleared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from edge_runtime.errors import BrokerError
from edge_runtime.wire import topics
from edge_runtime.wire.blobs import CHUNK_BYTES, split
from edge_runtime.wire.transport import Delivery, Transport

PINGS = 5
FIRST_BYTES = 8 * 1024
GROWTH = 4
# Sixteen chunks: fewer than a transport lets be on their way unacknowledged, so that publishing never blocks.
SIZE = 16 * CHUNK_BYTES

# Seconds that a transfer should take to be timed well, and beyond which nothing is still expected.
LONG_ENOUGH_S = 0.5
PATIENCE_S = 10.0


@dataclass(frozen=True)
class LinkRates:
    """What a test of the link found.

    Attributes:
        up_mbit_s: rate towards the broker, Mbit/s of payload.
        down_mbit_s: rate from the broker, Mbit/s of payload.
        latency_ms: milliseconds of a small message to the broker and back.
        size_bytes: payload that was sent each way in the transfer that counted.
    """

    up_mbit_s: float
    down_mbit_s: float
    latency_ms: float
    size_bytes: int

    @property
    def reason(self) -> str:
        """The sentence for a profile."""
        return f"measured: {self.size_bytes / 1024:.0f} KiB each way through the broker, less the latency"


def measure(
    transport: Transport,
    fleet: str,
    client: str,
    *,
    clock: Callable[[], float],
    size: int = SIZE,
    patience: float = PATIENCE_S,
) -> LinkRates:
    """Tests the link; takes a second or two, and on a very slow one at most a few times `patience`.

    Args:
        transport: connected, and with nothing else subscribed: what arrives and is not of the test is left
            unacknowledged, so the broker delivers it again after a reconnect.
        fleet: whose tree is used.
        client: whose topics are used.
        clock: seconds, from any beginning.
        size: bytes to send each way, at most.
        patience: seconds to wait for one transfer.

    Raises:
        BrokerError: the broker cannot be reached, or a transfer did not end in time; says how far it came.
        ValueError: no bytes to send, or more than `SIZE`.
    """
    if not 1 <= size <= SIZE:
        raise ValueError(f"a test of the link sends 1 to {SIZE} bytes; found {size}")
    test = _Test(transport, fleet, client, clock, patience)
    latency = test.latency()
    amount = min(FIRST_BYTES, size)
    while True:
        # Bytes that no compression on the way makes fewer.
        parts = split(hashlib.shake_256(b"link").digest(amount))
        try:
            up, down = test.up(parts), test.down(parts)
        finally:
            test.clear(len(parts))
        # No more than the slower direction can bear in time.
        bearable = int(amount * patience / 2 / max(up, down, 1e-9))
        following = min(size, amount * GROWTH, bearable)
        if min(up, down) >= LONG_ENOUGH_S or following <= amount:
            megabits = amount * 8 / 1e6
            return LinkRates(megabits / _net(up, latency), megabits / _net(down, latency), latency * 1e3, amount)
        amount = following


@dataclass(frozen=True)
class _Test:
    transport: Transport
    fleet: str
    client: str
    clock: Callable[[], float]
    patience: float

    def latency(self) -> float:
        """Median seconds of a small message there and back."""
        topic = topics.link(self.fleet, self.client, 0)
        self.transport.subscribe(topic)
        seconds, answers = [], []
        for number in range(PINGS):
            start = self.clock()
            self.transport.publish(topic, b"ping %d" % number)
            answers += self._collected({topic: b"ping %d" % number}, start + self.patience)
            if not answers or answers[-1].payload != b"ping %d" % number:
                raise BrokerError(self._late(number, PINGS))
            seconds.append(self.clock() - start)
        # Not before: an acknowledgement just before a message makes TCP hold the message back (Nagle's algorithm).
        for answer in answers:
            answer.ack()
        self.transport.unsubscribe(topic)
        return median(seconds)

    def up(self, parts: Sequence[bytes]) -> float:
        """Seconds until the broker has acknowledged all parts."""
        start = self.clock()
        for index, part in enumerate(parts):
            self.transport.publish(topics.link(self.fleet, self.client, index), part, retain=True)
        if not self.transport.flush(self.patience):
            raise BrokerError(
                f"the test of the link sent {sum(map(len, parts))} bytes and the broker did not acknowledge them "
                f"within {self.patience:g} s; check the link, or leave the test out"
            )
        return self.clock() - start

    def down(self, parts: Sequence[bytes]) -> float:
        """Seconds until the broker has delivered all parts.

        A NATS server may acknowledge a retained message a moment before it shows it to new subscribers. Whoever then
        hears nothing asks a second time.
        """
        wanted = {topics.link(self.fleet, self.client, index): part for index, part in enumerate(parts)}
        pattern = topics.link(self.fleet, self.client)
        found: set[str] = set()
        for patience in (self.patience / 2, self.patience):
            start = self.clock()
            self.transport.subscribe(pattern)
            came = self._collected(wanted, start + patience)
            seconds = self.clock() - start
            for delivery in came:
                delivery.ack()
            self.transport.unsubscribe(pattern)
            found = {delivery.topic for delivery in came if wanted.get(delivery.topic) == delivery.payload}
            if len(found) == len(wanted):
                return seconds
        raise BrokerError(self._late(len(found), len(wanted)))

    def clear(self, count: int) -> None:
        """Takes back what the broker retains."""
        for index in range(count):
            self.transport.publish(topics.link(self.fleet, self.client, index), b"", retain=True)
        self.transport.flush(self.patience)

    def _collected(self, wanted: Mapping[str, bytes], deadline: float) -> list[Delivery]:
        """The deliveries of this test until all that is wanted has come or it is late; what is not ours stays."""
        missing = dict(wanted)
        came = []
        prefix = topics.link(self.fleet, self.client).removesuffix("+")
        while missing and (left := deadline - self.clock()) > 0:
            delivery = self.transport.receive(left)
            if delivery is not None and delivery.topic.startswith(prefix):
                came.append(delivery)
                if missing.get(delivery.topic) == delivery.payload:
                    del missing[delivery.topic]
        return came

    def _late(self, came: int, wanted: int) -> str:
        return (
            f"the test of the link had {came} of {wanted} messages back within {self.patience:g} s; check the link, or "
            "leave the test out"
        )


def _net(seconds: float, latency: float) -> float:
    """Seconds that the bytes took, without the way there and back; never less than a tenth of what was timed."""
    return max(seconds - latency, seconds / 10, 1e-9)
