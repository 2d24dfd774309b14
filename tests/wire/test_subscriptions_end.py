"""What one client stops to listen to is no reason to lose what another one is told."""

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
"""NATS 2.15.0 and 2.15.1 lose messages in one such fleet of a hundred, and in the 201st on one server each time."""


def told(transport: Transport, number: int) -> set[tuple[str, bytes]]:
    """The first messages that come, so many if they do."""
    found = set[tuple[str, bytes]]()
    while len(found) < number and (delivery := transport.receive(5.0)) is not None:
        delivery.ack()
        found.add((delivery.topic, delivery.payload))
    return found


def device(transport: Transport, fleet: str, name: str) -> set[tuple[str, bytes]]:
    """Listens to retained bands, stops to, and says much while it does; what it said."""
    said = [(f"{fleet}/{name}/up", f"{at}".encode()) for at in range(14)]
    for topic in (f"{fleet}/{name}/down", f"{fleet}/round"):
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
    assert transport.flush(10.0)
    return set(said)


@pytest.mark.parametrize("kind", ["mosquitto", "nats"])
def test_a_broker_brings_all_that_is_said_while_subscriptions_end(
    start_broker: Callable[[str], EmbeddedBroker], kind: str
) -> None:
    address = start_broker(kind).address

    def client(name: str) -> Transport:
        return connect(address, name, on_event=lambda _: None, random=Random(0), patience=20)

    with ThreadPoolExecutor(2) as pool:
        for number in range(FLEETS):
            fleet = f"f{number}"
            server, *devices = [client(f"{fleet}-{name}") for name in ("server", "a", "b")]
            server.subscribe(f"{fleet}/+/up")
            running = [pool.submit(device, one, fleet, name) for one, name in zip(devices, "ab", strict=True)]
            for at in range(6):
                server.publish(f"{fleet}/blob/{at // 3}{at % 3}/0", b"x" * 400, retain=True)
            said = set.union(*(one.result() for one in running))
            assert said - told(server, len(said)) == set(), fleet
            for one in (server, *devices):
                one.close()
