"""What one client stops to listen to is no reason to lose what another one is told, and many may listen."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest

from edge_runtime.wire.broker import EmbeddedBroker
from edge_runtime.wire.mqtt import connect
from edge_runtime.wire.transport import Transport

pytestmark = [pytest.mark.broker, pytest.mark.slow]

FLEETS = 300
Said = set[tuple[str, bytes]]


@pytest.fixture(params=["mosquitto", "nats"])
def broker(request: pytest.FixtureRequest, start_broker: Callable[[str], EmbeddedBroker]) -> EmbeddedBroker:
    """Each of the real brokers in turn, with the product's own settings for unacknowledged messages."""
    return start_broker(request.param)


class Line:
    """A connection, and what it was told beside that it is there."""

    def __init__(self, broker: EmbeddedBroker, name: str) -> None:
        self.complaints: list[str] = []
        self.transport: Transport = connect(broker.address, name, on_event=self._hear, random=Random(0), patience=20)

    def _hear(self, event: str) -> None:
        if not event.startswith("connected"):
            self.complaints.append(event)

    def told(self, number: int) -> Said:
        """The first messages that come, so many if they do."""
        found = Said()
        while len(found) < number and (delivery := self.transport.receive(5.0)) is not None:
            delivery.ack()
            found.add((delivery.topic, delivery.payload))
        return found


def take_part(transport: Transport, fleet: str, name: str) -> Said:
    """Listen to retained bands, stop to, and say much meanwhile; what was said."""
    said = [(f"{fleet}/{name}/up", f"{at}".encode()) for at in range(14)]
    own = (f"{fleet}/{name}/down", f"{fleet}/round")
    for topic in own:
        transport.subscribe(topic)
    for version in range(2):
        bands = [f"{fleet}/blob/{version}{band}/+" for band in range(3)]
        for band in bands:
            transport.subscribe(band)
        for topic, payload in said[7 * version :][:3]:
            transport.publish(topic, payload)
        for band in bands:
            transport.unsubscribe(band)
        for topic, payload in said[7 * version :][3:7]:
            transport.publish(topic, payload)
    for topic in own:
        transport.unsubscribe(topic)
    assert transport.flush(10.0)
    return set(said)


def test_a_broker_brings_all_that_is_said_while_subscriptions_end(broker: EmbeddedBroker) -> None:
    with ThreadPoolExecutor(2) as pool:
        for number in range(FLEETS):
            fleet = f"f{number}"
            server, *devices = lines = [Line(broker, f"{fleet}-{name}") for name in ("server", "a", "b")]
            server.transport.subscribe(f"{fleet}/+/up")
            running = [
                pool.submit(take_part, one.transport, fleet, name) for one, name in zip(devices, "ab", strict=True)
            ]
            for at in range(6):
                server.transport.publish(f"{fleet}/blob/{at // 3}{at % 3}/0", b"x" * 400, retain=True)
            said = set.union(*(one.result() for one in running))
            told = server.told(len(said))
            server.transport.unsubscribe(f"{fleet}/+/up")
            assert server.transport.flush(10.0)
            for one in lines:
                one.transport.close()
            assert [one.complaints for one in lines] == [[], [], []]
            assert said - told == set(), fleet


def test_a_broker_takes_the_subscriptions_of_a_large_fleet(broker: EmbeddedBroker) -> None:
    """Of many clients: what one session may have is another limit, which no device comes near."""
    lines = [Line(broker, f"device-{number}") for number in range(12)]
    for number, line in enumerate(lines):
        for topic in range(100):
            line.transport.subscribe(f"fleet/{number}/{topic}")
    for line in lines:
        line.transport.close()
    assert [line.complaints for line in lines if line.complaints] == []
