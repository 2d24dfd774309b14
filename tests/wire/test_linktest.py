"""The test of a link: what it finds is what the link is, and it leaves nothing behind."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import pytest

from edge_runtime.errors import BrokerError
from edge_runtime.wire import topics
from edge_runtime.wire.broker import EmbeddedBroker
from edge_runtime.wire.linktest import FIRST_BYTES, SIZE, measure
from edge_runtime.wire.memory import MemoryBroker
from edge_runtime.wire.transport import Delivery, Transport
from tests.wire.conftest import Clients

FLEET, CLIENT = "fleet", "pi"


@dataclass
class Clock:
    """Seconds that pass when a line says so."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Line:
    """A transport over a line of given rates, whose time passes on a clock of its own.

    Attributes:
        inner: the transport behind the line.
        clock: is moved on by what crosses the line.
        up: bytes per second towards the broker; 0 for a line that takes nothing.
        down: bytes per second from the broker.
        latency: seconds there and back, of each acknowledgement and of what answers a subscription or message.
        waits: whether the next delivery is such an answer.
    """

    inner: Transport
    clock: Clock
    up: float
    down: float
    latency: float
    waits: bool = field(default=True)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        if self.up:
            self.clock.now += len(payload) / self.up
            self.inner.publish(topic, payload, retain=retain)
        self.waits = True

    def flush(self, timeout: float) -> bool:
        self.clock.now += self.latency if self.up else timeout
        return self.up > 0

    def subscribe(self, pattern: str) -> None:
        self.waits = True
        self.inner.subscribe(pattern)

    def unsubscribe(self, pattern: str) -> None:
        self.inner.unsubscribe(pattern)

    def receive(self, timeout: float) -> Delivery | None:
        delivery = self.inner.receive(0)
        if delivery is None:
            self.clock.now += timeout
            return None
        self.clock.now += len(delivery.payload) / self.down + (self.latency if self.waits else 0)
        self.waits = False
        return delivery

    def close(self) -> None:
        self.inner.close()

    @property
    def connected(self) -> bool:
        return self.inner.connected

    @property
    def largest(self) -> int:
        return self.inner.largest

    @property
    def sessions(self) -> int:
        return self.inner.sessions

    @property
    def bytes_sent(self) -> int:
        return self.inner.bytes_sent

    @property
    def bytes_received(self) -> int:
        return self.inner.bytes_received


def line(broker: MemoryBroker, up: float, down: float, latency: float) -> Line:
    """A client of the broker behind such a line."""
    return Line(broker.connect(CLIENT), Clock(), up, down, latency)


@pytest.mark.parametrize(("up", "down"), [(20e3, 20e3), (20e3, 200e3), (200e3, 20e3), (500e3, 2e6), (10e6, 50e6)])
@pytest.mark.parametrize("latency", [0.002, 0.05])
def test_the_rates_found_are_those_of_the_line(up: float, down: float, latency: float) -> None:
    broker = MemoryBroker()

    found = measure(slow := line(broker, up, down, latency), FLEET, CLIENT, clock=slow.clock)

    assert found.up_mbit_s == pytest.approx(up * 8 / 1e6, rel=0.1)
    assert found.down_mbit_s == pytest.approx(down * 8 / 1e6, rel=0.1)
    # A ping has six bytes, which a slow line takes a moment for each way.
    assert found.latency_ms == pytest.approx(latency * 1e3, rel=0.1, abs=0.7)
    assert broker.retained == {}


def test_a_slow_line_is_measured_with_little_and_a_fast_one_with_all() -> None:
    slow, fast = line(MemoryBroker(), 2e3, 2e3, 0.05), line(MemoryBroker(), 1e9, 1e9, 0.05)

    assert measure(slow, FLEET, CLIENT, clock=slow.clock).size_bytes == FIRST_BYTES
    assert slow.clock.now < 30
    assert measure(fast, FLEET, CLIENT, clock=fast.clock).size_bytes == SIZE


def test_a_line_that_takes_nothing_ends_the_test_in_time() -> None:
    dead = line(MemoryBroker(), 0, 1e6, 0.1)

    with pytest.raises(BrokerError, match=r"0 of 5 messages back within 10 s"):
        measure(dead, FLEET, CLIENT, clock=dead.clock)
    assert dead.clock.now <= 11


def test_a_line_that_loses_its_upstream_later_says_what_was_sent() -> None:
    broker = MemoryBroker()
    dying = line(broker, 1e6, 1e6, 0.1)
    subscribe = dying.unsubscribe

    def unsubscribe(pattern: str) -> None:
        dying.up = 0
        subscribe(pattern)

    dying.unsubscribe = unsubscribe  # type: ignore[method-assign]  # the line breaks after the first phase

    with pytest.raises(BrokerError, match=rf"sent {FIRST_BYTES} bytes .* did not acknowledge"):
        measure(dying, FLEET, CLIENT, clock=dying.clock)


def test_retained_messages_that_come_late_are_asked_for_again() -> None:
    broker = MemoryBroker()
    late = line(broker, 1e6, 1e6, 0.1)
    subscribe, asked = late.subscribe, []

    def deaf(pattern: str) -> None:
        asked.append(pattern)
        if asked.count(pattern) > 1 or "+" not in pattern:
            subscribe(pattern)

    late.subscribe = deaf  # type: ignore[method-assign]  # the broker forgets the first subscription to a pattern

    assert measure(late, FLEET, CLIENT, clock=late.clock).down_mbit_s == pytest.approx(8, rel=0.1)


def test_what_is_not_of_the_test_is_left_for_whoever_waits_for_it() -> None:
    broker = MemoryBroker()
    transport = broker.connect(CLIENT)
    transport.subscribe(topics.down(FLEET, CLIENT))
    broker.connect("server").publish(topics.down(FLEET, CLIENT), b"welcome")

    measure(transport, FLEET, CLIENT, clock=time.monotonic)
    transport.drop()
    transport.resume()

    kept = transport.receive(0)
    assert kept is not None
    assert (kept.topic, kept.payload) == (topics.down(FLEET, CLIENT), b"welcome")


def test_what_an_earlier_test_left_behind_does_no_harm() -> None:
    broker = MemoryBroker()
    for part in (0, 5):
        broker.connect("older").publish(topics.link(FLEET, CLIENT, part), b"left behind", retain=True)

    assert measure(broker.connect(CLIENT), FLEET, CLIENT, clock=time.monotonic).up_mbit_s > 0


@pytest.mark.parametrize("size", [0, -1, SIZE + 1])
def test_an_amount_that_would_measure_nothing_or_block_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=str(size)):
        measure(MemoryBroker().connect(CLIENT), FLEET, CLIENT, clock=time.monotonic, size=size)


@pytest.mark.broker
def test_a_real_broker_is_measured_and_left_clean(any_broker: EmbeddedBroker, to_broker) -> None:
    clients: Clients = to_broker(any_broker)

    found = measure(clients.connect(CLIENT), FLEET, CLIENT, clock=time.monotonic, size=300_000)

    assert min(found.up_mbit_s, found.down_mbit_s, found.latency_ms) > 0
    onlooker = clients.connect("onlooker")
    onlooker.subscribe(topics.link(FLEET, CLIENT))
    assert onlooker.receive(0.3) is None
